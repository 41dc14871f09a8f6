package reconcile

import (
	"context"
	"slices"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/ledger"
)

// Step is an action of a plan, and how it stands.
type Step struct {
	Action
	// UnderWay: it is being done.
	UnderWay bool
	// Trouble is why it did not work so far; nil: nothing went wrong.
	Trouble *Trouble
}

// Outlook is what is to be done about the objects of one kind in a VM.
type Outlook struct {
	VM    uuid.UUID
	Kind  string
	Steps []Step
	// Blind is why the world could not be looked at, or nil. The steps are then
	// those that are under way or did not work.
	Blind error
}

// Outlook returns, for each kind of which something is to be done in the VM or
// waits, what the reconciler would do now. It touches nothing.
func (r *Reconciler) Outlook(ctx context.Context, vm uuid.UUID) []Outlook {
	var out []Outlook
	for _, a := range r.o.Appliers {
		o := Outlook{VM: vm, Kind: a.Kind()}
		v, err := r.look(ctx, corner{vm, a.Kind()})
		o.Blind = err
		if err != nil {
			v = r.desire(corner{vm, a.Kind()})
			v.plan = r.known(v)
		}
		there := v.seen()
		for _, action := range v.plan {
			o.Steps = append(o.Steps, r.step(action, there))
		}
		if len(o.Steps) > 0 || o.Blind != nil {
			out = append(out, o)
		}
	}
	return out
}

// known are the steps that are certain without a look at the world.
func (r *Reconciler) known(v view) []Action {
	plan := Plan(nil, v.ending, nil, v.instances, r.o.Clock.Now())
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, d := range v.desired {
		if t := r.troubles[d.ID]; t != nil {
			plan = append(plan, Action{Verb: t.Verb, Object: d, Why: "a live grant needs it"})
		}
	}
	return plan
}

func (r *Reconciler) step(a Action, there map[string]Observed) Step {
	s := Step{Action: a}
	if o, seen := there[a.Object.ID]; a.Verb.Cuts() && r.isCut(a) && (!seen || o.Presence == Gone) {
		s.Why = "it is gone, which the ledger has yet to be told"
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if a.Verb == Wait {
		return s
	}
	if t := r.troubles[a.Object.ID]; t != nil && t.Verb.Cuts() == a.Verb.Cuts() {
		now := r.present(t)
		s.Trouble = &now
	}
	if a.Verb.Cuts() {
		c := r.cutting[a.Object.ID]
		s.UnderWay = c != nil && !c.resting
	} else {
		s.UnderWay = r.applying[a.Object.ID] != nil
	}
	return s
}

// Preview returns what the reconciler would do for the VM if extra were
// granted as well, and touches nothing.
func (r *Reconciler) Preview(ctx context.Context, vm uuid.UUID, extra ...ledger.Grant) ([]Action, error) {
	var out []Action
	for _, a := range r.o.Appliers {
		v, err := r.look(ctx, corner{vm, a.Kind()})
		if err != nil {
			return nil, err
		}
		more := Objects(map[string]Kind{a.Kind(): a}, extra, func(ledger.Grant) bool { return true })
		for _, o := range more {
			if i := slices.IndexFunc(v.desired, func(d Object) bool { return d.ID == o.ID }); i >= 0 {
				v.desired[i].Owners = union(v.desired[i].Owners, o.Owners)
				v.desired[i].Generation++
				continue
			}
			v.desired = append(v.desired, o)
		}
		out = append(out, Plan(v.desired, v.ending, v.observed, v.instances, r.o.Clock.Now())...)
	}
	return out, nil
}
