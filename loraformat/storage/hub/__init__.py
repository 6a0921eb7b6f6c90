"""hf:// addresses: repositories of the Hugging Face Hub, read by ranges, and written in one commit."""

from loraformat.storage.hub.addresses import Address, normalized
from loraformat.storage.hub.cached import CachedRepository
from loraformat.storage.hub.publication import Publication, Published, Publishing, check_publication
from loraformat.storage.hub.repository import HubStore, open_repository
from loraformat.storage.hub.staging import require_space, stage

__all__ = [
    "Address",
    "CachedRepository",
    "HubStore",
    "Publication",
    "Published",
    "Publishing",
    "check_publication",
    "normalized",
    "open_repository",
    "require_space",
    "stage",
]
