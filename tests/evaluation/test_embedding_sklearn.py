"""`DinoFeatures` is a step of scikit-learn: cloned, pickled, searched, named, and checked by scikit-learn itself."""

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from embedding_cases import CHECKPOINT, SIZE, expected_features, picture_files, pictures
from PIL import Image

import dino_lightning
from dino_lightning.errors import UserError

pytest.importorskip("sklearn", reason="pip install 'dino-lightning[sklearn]'")

from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import estimator_checks

from dino_lightning.evaluation.embedding.sklearn import DinoFeatures


def small(**options: Any) -> DinoFeatures:
    return DinoFeatures(CHECKPOINT, **{"image_size": SIZE, "device": "cpu", **options})


def test_transform_gives_the_features_of_embed(tmp_path: Path) -> None:
    files = picture_files(tmp_path, 5)
    want = dino_lightning.embed(files, CHECKPOINT, image_size=SIZE, feature_cache=None, batch_size=2, num_workers=0)
    arrays = pictures(5)
    for X in (
        files,
        np.array([str(path) for path in files]),
        np.array([[str(path)] for path in files], dtype=object),  # as a ColumnTransformer hands over a column
        arrays,
        np.stack(arrays),
        [Image.fromarray(pixels) for pixels in arrays],
    ):
        features = small(batch_size=2).fit_transform(X)
        assert features.dtype == np.float32
        np.testing.assert_array_equal(features, want.features)
    np.testing.assert_allclose(features, expected_features(files).numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(small(batch_size=2, num_workers=1).transform(files), want.features)
    assert small().transform([]).shape == (0, 64)
    assert small(features="mean_patch").transform(files).shape == (5, 64)
    assert small(n_last_blocks=2).transform(files).shape == (5, 128)


def test_as_many_names_as_features() -> None:
    """Also of a network with a layer between pooling and classifier, which `mean_patch` is before."""
    for features in ("class", "mean_patch"):
        model = DinoFeatures("untrained:mobilenetv3_small_050", features=features, image_size=SIZE, device="cpu")
        assert model.fit_transform(pictures(1)).shape == (1, len(model.get_feature_names_out()))


def test_data_frames_in_and_out(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    paths = [str(path) for path in picture_files(tmp_path, 3)]
    table = pandas.DataFrame({"path": paths}, index=[7, 8, 9])
    features = small().set_output(transform="pandas").fit_transform(table)
    assert list(features.index) == [7, 8, 9]
    assert list(features.columns) == [f"dinofeatures{i}" for i in range(64)]
    np.testing.assert_array_equal(features.to_numpy(), small().transform(table["path"]))


def test_parameters_clones_and_pickles() -> None:
    step, images = small(batch_size=4), pictures(3)
    features = step.fit_transform(images)
    assert clone(step).get_params() == step.get_params()
    stored = pickle.dumps(step)
    assert len(stored) < 1000, "parameters, no weights"
    np.testing.assert_array_equal(pickle.loads(stored).transform(images), features)
    step.set_params(image_size=16)
    assert not np.array_equal(step.transform(images), features)
    step.set_params(image_size=SIZE, checkpoint="untrained:vit_tiny")
    assert step.transform(images).shape == (3, 192), "the network of the new parameter"


def test_grid_search_of_a_pipeline() -> None:
    images = np.stack(pictures(24))
    labels = np.arange(24) % 2  # clownfish, monarch, … against blue tang, toadstool, …
    model = Pipeline([("dino", small()), ("scale", StandardScaler()), ("classify", LogisticRegression(max_iter=500))])
    grid = {"dino__features": ["class", "mean_patch"], "classify__C": [0.01, 1.0]}
    search = GridSearchCV(model, grid, cv=2, error_score="raise").fit(images, labels)
    assert set(search.best_params_) == set(grid)
    assert len(set(search.cv_results_["mean_test_score"])) > 1
    assert search.predict(images[:3]).shape == (3,)
    scores = cross_val_score(make_pipeline(small(), LogisticRegression(max_iter=500)), list(images), labels, cv=2)
    assert np.isfinite(scores).all()


# No images are what these hand over, so those that transform something are not among them: see the tests above.
CHECKS = [
    "check_estimator_cloneable",
    "check_estimator_repr",
    "check_estimator_tags_renamed",
    "check_valid_tag_types",
    "check_no_attributes_set_in_init",
    "check_get_params_invariance",
    "check_set_params",
]


@pytest.mark.parametrize("name", CHECKS)
def test_checks_of_scikit_learn(name: str) -> None:
    check = getattr(estimator_checks, name, None)
    if check is None:
        pytest.skip("not in this version of scikit-learn")
    check("DinoFeatures", small())


def test_errors_are_one_sentence(tmp_path: Path) -> None:
    files = picture_files(tmp_path, 3)
    files[1].write_bytes(b"")
    for workers in (0, 1):
        with pytest.raises(
            UserError, match=r"^X: 1 of 3 images cannot be read \(.*001\.png: the file is empty\); leave"
        ):
            small(num_workers=workers).transform(files)
    for options, expected in (
        ({"features": "cls"}, "features=cls: did you mean 'class'"),
        ({"batch_size": 0}, "batch_size=0: expected at least 1"),
        ({"device": "gpu"}, "device=gpu: PyTorch cannot use such a device"),
        ({"checkpoint_key": "techer"}, "checkpoint_key=techer"),
        ({"image_size": 30}, "image_size=30 is not a multiple of the patch size 8"),
    ):
        with pytest.raises(UserError, match=expected):
            small(**options).fit(files)
    with pytest.raises(UserError, match=r"X: str is a single image; expected a list"):
        small().transform(str(files[0]))


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    monkeypatch.delitem(sys.modules, "dino_lightning.evaluation.embedding.sklearn")
    monkeypatch.delitem(vars(dino_lightning), "DinoFeatures", raising=False)
    with pytest.raises(UserError, match=r'DinoFeatures needs scikit-learn.*pip install "dino-lightning\[sklearn\]"'):
        dino_lightning.DinoFeatures  # noqa: B018


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_within_rounding() -> None:
    images = pictures(5)
    on_gpu = small(device="cuda").transform(images)
    np.testing.assert_allclose(on_gpu, small().transform(images), rtol=0, atol=2e-2)  # TF32 is 10 bits
