"""Text in, token ids out, and back: tokenizer, chat template, streaming, stop strings.

text = Text(bundle.spec.text, bundle.file("tokenizer.json").read_bytes())
ids = text.encode_chat([{"role": "user", "content": "Hello"}])
"""

from edge_mmllm.text.stream import StopMatcher, StreamDecoder
from edge_mmllm.text.tokenizer import Message, Text

__all__ = ["Message", "StopMatcher", "StreamDecoder", "Text"]
