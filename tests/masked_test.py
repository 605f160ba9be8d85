"""Masked reductions against numpy.ma and hand-derived aggregations."""

import numpy as np
import pytest

from mtp_rl.objectives import masked

X = np.asarray([[1., 2., 3.], [10., 20., 30.], [7., 8., 9.]], np.float32)
M = np.asarray([[1, 1, 0], [1, 0, 0], [0, 0, 0]], bool)


@pytest.mark.parametrize('axis', [None, 0, 1])
def test_sum_and_mean_are_those_of_numpy_ma(axis):
  reference = np.ma.masked_array(X, ~M)
  np.testing.assert_allclose(masked.total(X, M, axis),
                             reference.sum(axis).filled(0)
                             if axis is not None else reference.sum())
  mean = reference.mean(axis)
  np.testing.assert_allclose(masked.mean(X, M, axis),
                             mean.filled(0) if axis is not None else mean)


def test_nothing_selected_gives_zero():
  none = np.zeros_like(M)
  assert masked.mean(X, none) == 0
  for how in masked.AGGREGATIONS:
    assert masked.aggregate(X, none, how) == 0


@pytest.mark.parametrize('how, expected', [
    ('token-mean', (1 + 2 + 10) / 3),
    # Rows: 1 + 2 = 3 and 10; the empty third row counts nowhere.
    ('seq-mean-token-sum', (3 + 10) / 2),
    ('seq-mean-token-mean', (1.5 + 10) / 2),
    ('seq-mean-token-sum-norm', (3 + 10) / (2 * 3)),
])
def test_aggregations_by_hand(how, expected):
  np.testing.assert_allclose(masked.aggregate(X, M, how), expected, rtol=1e-6)


def test_masked_values_may_be_anything():
  x = np.where(M, X, np.nan)
  assert np.isfinite(masked.aggregate(x, M, 'token-mean'))


def test_unknown_aggregation_is_named():
  with pytest.raises(ValueError, match='median'):
    masked.aggregate(X, M, 'median')
