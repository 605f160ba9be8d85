"""Group advantages by hand."""

import numpy as np
import pytest

from mtp_rl.objectives import advantages


def test_grpo_divides_by_the_sample_deviation():
  # Group 1: mean .5, deviations -+.5, ddof-1 std sqrt(4 * .25 / 3) = .57735.
  got = advantages.group_advantages([1, 0, 1, 0, 0, 0, 0, 4], 4, 'grpo')
  # Group 2: mean 1, deviations -1 -1 -1 3, std sqrt(12 / 3) = 2.
  np.testing.assert_allclose(
      got, [.866025, -.866025, .866025, -.866025, -.5, -.5, -.5, 1.5],
      atol=1e-5)


def test_dr_grpo_subtracts_the_mean_only():
  got = advantages.group_advantages([1, 0, 3, 0], 4, 'dr_grpo')
  np.testing.assert_allclose(got, [0, -1, 2, -1])


def test_rloo_subtracts_the_mean_of_the_others():
  got = advantages.group_advantages([1, 0, 3, 0], 4, 'rloo')
  np.testing.assert_allclose(got, [0, -4 / 3, 8 / 3, -4 / 3], rtol=1e-6)


@pytest.mark.parametrize('kind', ['grpo', 'dr_grpo', 'rloo'])
@pytest.mark.parametrize('reward, group', [(0., 4), (1., 4), (.9, 12), (.1, 7)])
def test_equal_rewards_teach_nothing(kind, reward, group):
  got = advantages.group_advantages([reward] * 2 * group, group, kind)
  assert got.dtype == np.float32
  np.testing.assert_array_equal(got, np.zeros(2 * group))


@pytest.mark.parametrize('kind', ['grpo', 'dr_grpo'])
def test_a_group_of_one_has_its_reward_as_advantage(kind):
  np.testing.assert_array_equal(
      advantages.group_advantages([1, 0, .5], 1, kind), [1, 0, .5])


def test_a_group_of_one_has_no_leave_one_out_mean():
  with pytest.raises(ValueError, match='rl.group'):
    advantages.group_advantages([1, 0], 1, 'rloo')


def test_overlong_answers_lose_by_the_token():
  # L_max 20, buffer 8: free up to 12, then 1/8 of the penalty a token.
  got = advantages.overlong_penalty([0, 12, 13, 16, 20], 20, 8, 2.)
  np.testing.assert_allclose(got, [0, 0, -.25, -1, -2])
  assert not advantages.overlong_penalty([20], 20, 0, 1.).any()


def test_varied_groups_come_first_in_drawn_order():
  rewards = [1, 1, 0, 1, .5, .5, 0, 0, 1, 0]
  varied = advantages.varied_groups(rewards, 2)
  np.testing.assert_array_equal(varied, [0, 1, 0, 0, 1])
  choose = lambda n: advantages.choose_groups(varied, n).tolist()
  assert choose(1) == [1] and choose(2) == [1, 4]
  assert choose(3) == [1, 4, 0] and choose(5) == [1, 4, 0, 2, 3]
