"""All tables of wrong inputs."""

from wrong_archives import ROWS as ARCHIVES
from wrong_checkpoints import ROWS as CHECKPOINTS
from wrong_environments import ROWS as ENVIRONMENTS
from wrong_images import ROWS as IMAGES
from wrong_inputs import Wrong
from wrong_labels import ROWS as LABELS
from wrong_resumed import ROWS as RESUMED

TABLES: dict[str, list[Wrong]] = {
    "Images": IMAGES,
    "Labels, lists and tables": LABELS,
    "Archives, streams and named datasets": ARCHIVES,
    "Checkpoints to evaluate": CHECKPOINTS,
    "Resumed runs": RESUMED,
    "Machine and environment": ENVIRONMENTS,
}
