"""The types of loralign: data and protocols, no logic.

Letters everywhere: W (d_out, d_in), A (r, d_in), B (d_out, r), s the scale, G = dL/dW_eff (d_out, d_in),
gA = s·Bᵀ·G, gB = s·G·Aᵀ, and W_eff = W0 + s·B·A for a plain adapter.

An adapter is a set of rank-1 *slots* (row of A, column of B); see `slots`. Every method is a rule about slots on one of
five axes (`axes`):

    init       what the live (and twin) slots hold before step 0
    form       which tensors train and how they become (A, B)
    transform  how gradients of a pair become updates of the pair
    rules      penalties, masks and slot events during training
    outer      episodes: commit live slots to frozen ones, start again
"""

from loralign.types.axes import Ctx as Ctx
from loralign.types.axes import Episode as Episode
from loralign.types.axes import Form as Form
from loralign.types.axes import FormBase as FormBase
from loralign.types.axes import Group as Group
from loralign.types.axes import Init as Init
from loralign.types.axes import Moment as Moment
from loralign.types.axes import Outer as Outer
from loralign.types.axes import Prepared as Prepared
from loralign.types.axes import Rule as Rule
from loralign.types.axes import RuleBase as RuleBase
from loralign.types.axes import Transform as Transform
from loralign.types.errors import LoralignError as LoralignError
from loralign.types.errors import VerificationFailed as VerificationFailed
from loralign.types.errors import WorkFailed as WorkFailed
from loralign.types.facts import Facts as Facts
from loralign.types.needs import NOTHING as NOTHING
from loralign.types.needs import Activations as Activations
from loralign.types.needs import Batch as Batch
from loralign.types.needs import Batches as Batches
from loralign.types.needs import CommonSubspace as CommonSubspace
from loralign.types.needs import Directions as Directions
from loralign.types.needs import Draw as Draw
from loralign.types.needs import Inputs as Inputs
from loralign.types.needs import Loss as Loss
from loralign.types.needs import Need as Need
from loralign.types.needs import Nothing as Nothing
from loralign.types.needs import Preheated as Preheated
from loralign.types.needs import RuleNeed as RuleNeed
from loralign.types.needs import Site as Site
from loralign.types.needs import Sketch as Sketch
from loralign.types.needs import TopGradient as TopGradient
from loralign.types.needs import Train as Train
from loralign.types.needs import Validation as Validation
from loralign.types.needs import Weight as Weight
from loralign.types.recipe import ExportClass as ExportClass
from loralign.types.recipe import Full as Full
from loralign.types.recipe import LrPrior as LrPrior
from loralign.types.recipe import Method as Method
from loralign.types.recipe import Recipe as Recipe
from loralign.types.recipe import over_rank as over_rank
from loralign.types.recipe import over_sqrt_rank as over_sqrt_rank
from loralign.types.slots import Copy as Copy
from loralign.types.slots import Elements as Elements
from loralign.types.slots import Freeze as Freeze
from loralign.types.slots import Grad as Grad
from loralign.types.slots import InputSquares as InputSquares
from loralign.types.slots import Joint as Joint
from loralign.types.slots import Live as Live
from loralign.types.slots import Named as Named
from loralign.types.slots import Off as Off
from loralign.types.slots import On as On
from loralign.types.slots import Operator as Operator
from loralign.types.slots import Pair as Pair
from loralign.types.slots import Plan as Plan
from loralign.types.slots import Prox as Prox
from loralign.types.slots import RuleState as RuleState
from loralign.types.slots import Set as Set
from loralign.types.slots import SiteShape as SiteShape
from loralign.types.slots import SlotChange as SlotChange
from loralign.types.slots import Stack as Stack
from loralign.types.slots import Start as Start
from loralign.types.slots import State as State
from loralign.types.slots import Unborn as Unborn
from loralign.types.slots import Verb as Verb
from loralign.types.slots import Zero as Zero
from loralign.types.slots import ZeroWhere as ZeroWhere
