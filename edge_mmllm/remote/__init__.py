"""Benches on other devices: `bench --target ssh://user@host[:port]`, `--target adb[:serial]`.

targets.py     what a target is, and what every way to a device can do (`Shell`)
ssh.py         over SSH (paramiko, extra `remote`); the host's key is pinned
adb.py         through the adb program
deploy.py      copies files: by content, resumed, checksummed
supervisor.py  runs on the device: ends the bench when the connection does
bench.py       all of it together
"""
