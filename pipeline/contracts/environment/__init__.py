"""The contracts that every environment keeps, ours and a user's own, and a suite that looks for broken ones.

    actfocus contracts --id lamps:Lamps-v0 --settings '{"faulty": 0.1}'

``CONTRACTS`` says what is checked, in order. docs/environments.md says why.
"""

from pipeline.contracts.environment.check import CONTRACTS, check_environment
from pipeline.contracts.environment.suite import Bounds

__all__ = ["CONTRACTS", "Bounds", "check_environment"]
