"""hf:// addresses: repositories of the Hugging Face Hub, read by ranges, and written in one commit."""

from loraformat.storage.hub.addresses import Address, normalized
from loraformat.storage.hub.cached import CachedRepository
from loraformat.storage.hub.output import HubOutput
from loraformat.storage.hub.repository import HubStore, open_repository
from loraformat.storage.hub.staging import require_space, stage

__all__ = [
    "Address",
    "CachedRepository",
    "HubOutput",
    "HubStore",
    "normalized",
    "open_repository",
    "require_space",
    "stage",
    "target",
]
