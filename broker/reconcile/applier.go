package reconcile

import (
	"context"
	"errors"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/capabilities"
)

// Applier makes the objects of one kind exist or not, and says which exist.
// All methods may be called at once, for one object too, and end soon after
// their ctx does.
type Applier interface {
	Kind
	// Observe returns the objects of this kind in one VM. An object that it
	// does not return does not exist, so it fails rather than guess.
	Observe(ctx context.Context, vm uuid.UUID) ([]Observed, error)
	// Apply returns when the object is there, with a note for people or "". It
	// fails with [ErrNotNow] where the VM's run ended, or has yet to begin, and
	// with [ErrTransient] where asking again may help. Any other error ends the
	// grants that it was made for.
	//
	// Of an object that grants share it takes away what is there for grants that
	// are not among its owners, also where the generation is the same, and leaves
	// what the others have as it was, also where it fails.
	Apply(ctx context.Context, o Object) (note string, err error)
	// Withdraw returns when nothing of the object gives access any more, and
	// makes sure that an Apply of an older generation fails from then on. The
	// note says what had to be done by force, or is "".
	Withdraw(ctx context.Context, o Object) (note string, err error)
}

// ErrNotNow says that an application found no run of the VM to apply to. It
// speaks against no grant: those tied to the run end with it, and any other
// waits for the next one.
var ErrNotNow = errors.New("the VM does not run just now")

// ErrTransient says that an application failed for a reason that may pass: what
// was asked did not answer, or is busy. It is tried again, less often each time.
var ErrTransient = errors.New("it may work later")

// ErrStale is the refusal of an older generation of an object that grants can
// share. Where nothing newer is on record (what the last broker withdrew from one
// of its owners) it is made in a newer one for those who are left.
var ErrStale = errors.New("an older generation")

// transient tells whether an application is to be tried again.
func transient(err error) bool {
	return errors.Is(err, ErrTransient) || errors.Is(err, context.DeadlineExceeded)
}

// Checker is an [Applier] that can tell before there is a grant that a
// capability cannot be applied.
type Checker interface {
	Check(ctx context.Context, c capabilities.Capability) error
}

// AgentFollower is an [Applier] that has a VM's agent do something for each
// object, and asks again when an agent comes back.
type AgentFollower interface {
	// AgentBack fails with [ErrNotNow] where the agent was not asked.
	AgentBack(ctx context.Context, o Object) error
}

// RunTeller is an [Applier] that knows the present run of a VM from the world,
// behind which Options.Instances may be.
type RunTeller interface {
	Run(ctx context.Context, vm uuid.UUID) (instance string, err error)
}

// Placer is an [Applier] whose objects have a place inside the VM.
type Placer interface {
	// Place is where the VM finds what was granted, or "".
	Place(g ledger.Grant) string
}

// Ledger is what the reconciler needs of the ledger.
type Ledger interface {
	View(fn func(s *ledger.State))
	Update(ctx context.Context, fn func(tx *ledger.Tx) error) ([]ledger.Event, error)
}

// Meter is told what the reconciler does. Its methods return at once.
type Meter interface {
	// Passed: a VM was looked at for one kind, in the lane "withdraw" or "apply".
	Passed(lane string, took time.Duration)
	// Failed: a step failed, or with the verb "observe" a look.
	Failed(kind, verb string)
}

type noMeter struct{}

func (noMeter) Passed(string, time.Duration) {}
func (noMeter) Failed(string, string)        {}
