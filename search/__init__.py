"""Search: agents that propose networks, the problem they solve, and the results.  Needs numpy, never torch.

agents.py        what an agent does; random search
variation.py     random networks, mutation, crossover of whole arrays
repair.py        children moved within exact limits
evolution.py     NSGA-II on whole arrays
genetic.py       once-for-all's evolution
aging.py         aging (regularized) evolution
storage.py       where Optuna keeps a study
shared.py        one search by several processes
optuna_agent.py  Optuna's samplers behind the same two calls
model_based.py   few measurements: a model says which networks to measure next
acquisition.py   what a measurement is expected to add
measured.py      measurements that are made once
pareto.py        ranks, crowding, fronts, hypervolume
limits.py        limits as people write them: "250KB", "60M", "5ms"
problem.py       predictors, objectives and limits as one function of genes
feasible.py      whether any network meets the limits, and the nearest one if none does
loop.py          the search itself, with resume
compare.py       agents beside each other
result.py        all evaluations, the front, the chosen network; saved and loaded
"""
