"""Gene expression of four kinds of tumour (Khan et al. 2001), as the package ISLP ships it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_fscreen.data.datamodule import stratified_split
from lightning_fscreen.data.features import FeatureDataModule, FeatureSet

FILES = ("Khan_xtrain.csv", "Khan_ytrain.csv", "Khan_xtest.csv", "Khan_ytest.csv")


class KhanDataModule(FeatureDataModule):
    """2,308 genes of 83 small round blue cell tumours of four kinds.

    The published test set has 20 tumours, too few to compare methods on; ``test_size`` of all 83 are drawn for each
    ``split_seed``, stratified.

    Args:
        root: folder with the four files; None for those in the installed package ISLP (which is not imported).
        test_size: number of tumours to test on.
        val_size: number or fraction of the others set aside for validation.
        **common: arguments of :class:`FeatureDataModule`.
    """

    def __init__(
        self, *, root: str | None = None, test_size: int = 27, val_size: int | float = 0, **common: Any
    ) -> None:
        super().__init__(root=root or _package_folder(), val_size=val_size, **common)
        if not 1 <= test_size < 80:
            raise ValueError(f"test_size must lie in 1..79, got {test_size}")
        self.test_size = test_size

    def prepare_data(self) -> None:
        """Check that the files are there.

        Raises:
            FileNotFoundError: a file is missing.
        """
        missing = [name for name in FILES if not (self.root / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{self.root.absolute()} has no {', '.join(missing)}: pip install --no-deps ISLP, or set "
                "data.root=FOLDER to where they are"
            )

    def load_train(self) -> FeatureSet:
        """Read the tumours that are not for testing; raises like :meth:`prepare_data`."""
        return self._load(test=False)

    def load_test(self) -> FeatureSet:
        """Read those for testing; raises like :meth:`prepare_data`."""
        return self._load(test=True)

    def _load(self, test: bool) -> FeatureSet:
        self.prepare_data()

        def read(name: str) -> torch.Tensor:
            return torch.from_numpy(np.loadtxt(self.root / name, delimiter=",", skiprows=1, dtype=np.float32))

        features = torch.cat([read("Khan_xtrain.csv"), read("Khan_xtest.csv")])
        labels = torch.cat([read("Khan_ytrain.csv"), read("Khan_ytest.csv")]).long() - 1
        index = stratified_split(labels, self.test_size, self.split_seed)[int(test)]
        return FeatureSet(features[index], labels[index], ["1", "2", "3", "4"])


def _package_folder() -> str:
    spec = find_spec("ISLP")
    found = spec.submodule_search_locations if spec is not None else None
    return str(Path(found[0]) / "data") if found else "data/Khan"
