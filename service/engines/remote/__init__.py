"""Experts that other OpenAI servers run: vLLM, llama.cpp, another of this service."""

from service.engines.remote.address import Remote, RemoteError
from service.engines.remote.engine import RemoteEngine
from service.engines.remote.server import Patience

__all__ = ["Patience", "Remote", "RemoteEngine", "RemoteError"]
