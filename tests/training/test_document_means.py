"""A mean over tokens and its standard error over documents, against a bootstrap."""

import numpy as np
import pytest

from cratelm.training.document_means import mean_over_documents


def test_the_standard_error_is_that_of_a_ratio_over_documents(rng: np.random.Generator) -> None:
    sums, sizes = rng.normal(size=(3, 40)), rng.integers(5, 50, size=40).astype(np.float64)
    mean, error = mean_over_documents(sums, sizes)
    np.testing.assert_allclose(mean, sums.sum(1) / sizes.sum())
    picks = rng.integers(40, size=(4000, 40))
    resampled = sums[0][picks].sum(1) / sizes[picks].sum(1)
    assert error[0] == pytest.approx(resampled.std(), rel=0.15)
    assert np.isnan(mean_over_documents(sums[:, :1], sizes[:1])[1]).all()
