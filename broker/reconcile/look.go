package reconcile

import (
	"context"
	"fmt"
	"slices"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/ledger"
)

// view is what one pass works from.
type view struct {
	grants    []ledger.Grant // of the VM, not final
	live      map[uuid.UUID]error
	instances map[uuid.UUID]string
	desired   []Object
	ending    []Object
	observed  []Observed
	plan      []Action
}

func (r *Reconciler) look(ctx context.Context, vm uuid.UUID) (view, error) {
	v := view{live: map[uuid.UUID]error{}}
	// The world is looked at between two looks at the ledger. What is observed
	// without a grant by the second look has none: an object's grant is on
	// record before it. What was confirmed by the first and is not observed is
	// gone: a grant becomes active after its object.
	confirmed := map[string]string{} // the runs that the objects of active grants were seen in
	r.o.Ledger.View(func(s *ledger.State) {
		for _, g := range s.Grants(ledger.Filter{Holder: vm, States: []ledger.GrantState{ledger.Active}}) {
			r.seenIn(g, confirmed)
		}
	})
	for _, a := range r.o.Appliers {
		seen, err := a.Observe(ctx, vm)
		if err != nil {
			return v, fmt.Errorf("cannot observe %s of VM %s: %w", a.Kind(), vm, err)
		}
		v.observed = append(v.observed, seen...)
	}
	now := r.o.Clock.Now()
	// Before the second look: what is revoked before its VM runs is not planned for
	// the run.
	v.instances = r.o.Instances()
	r.o.Ledger.View(func(s *ledger.State) {
		v.grants = s.Grants(ledger.Filter{Holder: vm, States: []ledger.GrantState{ledger.Pending, ledger.Active, ledger.Revoking}})
		for _, g := range v.grants {
			v.live[g.ID] = r.Live(s, g.ID)
		}
	})
	alive := func(g ledger.Grant) bool { return v.live[g.ID] == nil }
	dead := func(g ledger.Grant) bool { return v.live[g.ID] != nil }
	v.desired = Objects(r.kinds, v.grants, alive)
	v.ending = Objects(r.kinds, v.grants, dead)
	r.saw(v)
	v.observed = append(v.observed, r.missing(ctx, v, confirmed, v.instances[vm])...)
	v.plan = Plan(v.desired, v.ending, v.observed, v.instances, now)
	return v, nil
}

// seenIn tells the runs in which the objects of an active grant were last seen:
// that in which it became active, or, of a grant that persists, a later one.
func (r *Reconciler) seenIn(g ledger.Grant, runs map[string]string) {
	kind := r.kinds[g.Capability.Kind]
	if kind == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, o := range kind.Objects(g) {
		run, ok := r.seen[o.ID]
		if !ok {
			run = g.Instance
		}
		runs[o.ID] = run
	}
}

// saw notes in which run the objects of live grants are there.
func (r *Reconciler) saw(v view) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, o := range v.observed {
		if o.Presence == Present && slices.ContainsFunc(v.desired, func(d Object) bool { return d.ID == o.ID }) {
			r.seen[o.ID] = o.Instance
		}
	}
}

// missing reports as gone what an active grant was confirmed to have in this
// run of its VM and nobody sees any more.
func (r *Reconciler) missing(ctx context.Context, v view, confirmed map[string]string, instance string) []Observed {
	var out []Observed
	for _, g := range v.grants {
		kind := r.kinds[g.Capability.Kind]
		if kind == nil || g.State != ledger.Active || instance == "" {
			continue
		}
		for _, o := range kind.Objects(g) {
			there := slices.ContainsFunc(v.observed, func(seen Observed) bool { return seen.ID == o.ID })
			if confirmed[o.ID] == instance && !there && r.goesOn(ctx, o, instance) {
				out = append(out, Observed{
					ID: o.ID, Kind: o.Kind, VM: o.VM, Instance: instance, Generation: o.Generation,
					Presence: Gone, Detail: "what served it has ended",
				})
			}
		}
	}
	return out
}

// goesOn tells whether the run of an object's VM goes on. If it does, what was
// seen before was seen in that run.
func (r *Reconciler) goesOn(ctx context.Context, o Object, instance string) bool {
	teller, ok := r.appliers[o.Kind].(RunTeller)
	if !ok {
		return true
	}
	now, err := teller.Run(ctx, o.VM)
	return err == nil && now == instance
}
