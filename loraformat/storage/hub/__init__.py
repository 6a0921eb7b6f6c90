"""hf:// addresses: repositories of the Hugging Face Hub, read by ranges, and written in one commit."""

from loraformat.storage.hub.addresses import Address, normalized
from loraformat.storage.hub.cached import CachedRepository
from loraformat.storage.hub.repository import HubStore, open_repository

__all__ = ["Address", "CachedRepository", "HubStore", "normalized", "open_repository"]
