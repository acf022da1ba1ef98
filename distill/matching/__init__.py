"""The parts of the distribution-matching engine (``methods/distribution.py``), each pluggable from YAML:

    times.py       the law of the noise level t            rollout.py    which student sample is judged
    objectives.py  what the score difference is made into  critic.py     what the critic learns, and how often
    adversary.py   the discriminator                       terms.py      auxiliary losses
    refusals.py    what makes no sense
"""
