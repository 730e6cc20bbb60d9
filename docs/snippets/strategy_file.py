"""Load a strategy file, override it, and see what a wrong one says."""

from pathlib import Path

import kvcomp

folder = Path(__file__).parent

# --8<-- [start:load]
strategy = kvcomp.strategy(folder / "my-method.yaml")
print(strategy.matcher.quantile, strategy.merger.use, strategy.budget)  # 0.9 mean 64t

changed = kvcomp.strategy(folder / "my-method.yaml", budget=0.1, merger="pivot-mean", **{"policy.threshold": 0.2})
print(changed.policy.threshold, changed.merger.use)  # 0.2 pivot-mean
# --8<-- [end:load]

# --8<-- [start:faults]
try:
    kvcomp.strategy({"base": "flowmm", "set": {"matcher.quantile": 1.4, "scorer": "proxi-attention", "buget": 0.1}})
except kvcomp.ConfigError as error:  # print(error) shows the same, with all available names
    for fault in error.faults:
        print(fault.partition(" Available:")[0])
# --8<-- [end:faults]

# --8<-- [start:dump]
assert kvcomp.strategy(strategy.dump()) == strategy
# --8<-- [end:dump]
