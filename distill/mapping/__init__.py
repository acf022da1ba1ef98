"""The parts of the consistency engine (``methods/consistency.py``), each pluggable from YAML:

    pairs.py     which two times of a trajectory are compared, and to which end      points.py   where x_t comes from: data, or the teacher's own path
    solvers.py   the step between them: DDIM, Heun, SDE, or a line through data       tangent.py  the limit of no step: TrigFlow and its tangent
    truncation.py  a second stage for the high noise levels alone                     refusals.py  what makes no sense
    proxy.py       a reward's stand-in that is learnt online                          extras.py    adversary, terms, score distillation
"""
