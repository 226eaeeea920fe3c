"""`python -m edge_mmllm` is `edge-mmllm`."""

from edge_mmllm.cli import main

if __name__ == "__main__":
    main(prog_name="edge-mmllm")
