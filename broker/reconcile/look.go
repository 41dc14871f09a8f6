package reconcile

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/ledger"
)

// view is what one pass works from.
type view struct {
	corner    corner
	began     uint64         // in moments
	grants    []ledger.Grant // of the VM and kind, not final
	live      map[uuid.UUID]error
	instances map[uuid.UUID]string
	desired   []Object
	ending    []Object
	observed  []Observed
	plan      []Action
}

// byID are the indices of some objects.
func byID(objects []Object) map[string]int {
	out := make(map[string]int, len(objects))
	for i := range objects {
		out[objects[i].ID] = i
	}
	return out
}

// seen is what was observed, by object id.
func (v *view) seen() map[string]Observed {
	out := make(map[string]Observed, len(v.observed))
	for _, o := range v.observed {
		out[o.ID] = o
	}
	return out
}

// desire looks at the ledger alone.
func (r *Reconciler) desire(c corner) view {
	v := view{corner: c, live: map[uuid.UUID]error{}}
	// Before the look: what is revoked before its VM runs is not planned for the
	// run.
	v.instances = r.o.Instances()
	r.o.Ledger.View(func(s *ledger.State) {
		v.grants = r.held(s, c, ledger.Pending, ledger.Active, ledger.Revoking)
		for _, g := range v.grants {
			v.live[g.ID] = r.Live(s, g.ID)
		}
		v.desired = Objects(r.kinds, v.grants, func(g ledger.Grant) bool { return v.live[g.ID] == nil })
		v.ending = Objects(r.kinds, v.grants, func(g ledger.Grant) bool { return v.live[g.ID] != nil })
		for i := range v.desired {
			v.desired[i].Deadline = s.InThisBoot(v.desired[i].Deadline)
		}
		v.needs(s)
	})
	v.desired = raise(v.desired, v.ending)
	r.mu.Lock()
	for i := range v.desired {
		o := &v.desired[i]
		o.Generation = max(o.Generation, r.floors[o.ID])
	}
	r.mu.Unlock()
	r.needs(v)
	return v
}

// held are a VM's grants of one kind.
func (r *Reconciler) held(s *ledger.State, c corner, states ...ledger.GrantState) []ledger.Grant {
	return slices.DeleteFunc(s.Grants(ledger.Filter{Holder: c.vm, States: states}), func(g ledger.Grant) bool {
		return g.Capability.Kind != c.kind
	})
}

// needs makes another run of a VM that an object needs a newer generation of it.
// A run that is not on record yet is not there yet.
func (v *view) needs(s *ledger.State) {
	unsaid := map[uuid.UUID]bool{}
	for i := range v.desired {
		o := &v.desired[i]
		for _, vm := range o.Needs {
			o.Generation = max(o.Generation, s.RunChanged(vm))
			if run, on := s.Running(vm); vm != o.VM && (!on || run != v.instances[vm]) {
				unsaid[vm] = true
			}
		}
	}
	if len(unsaid) > 0 {
		v.instances = maps.Clone(v.instances)
		maps.DeleteFunc(v.instances, func(vm uuid.UUID, _ string) bool { return unsaid[vm] })
	}
}

// needs notes which VMs the objects of a corner need.
func (r *Reconciler) needs(v view) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for vm, who := range r.needed {
		delete(who, v.corner)
		if len(who) == 0 {
			delete(r.needed, vm)
			delete(r.runs, vm)
		}
	}
	for _, o := range v.desired {
		for _, vm := range o.Needs {
			if r.needed[vm] == nil {
				r.needed[vm] = map[corner]bool{}
			}
			r.needed[vm][v.corner] = true
		}
	}
}

func (r *Reconciler) look(ctx context.Context, c corner) (view, error) {
	// The world is looked at between two looks at the ledger. What is observed
	// without a grant by the second look has none: an object's grant is on
	// record before it. What was confirmed by the first and is not observed is
	// gone: a grant becomes active after its object.
	confirmed := map[string]sight{} // where the objects of active grants were seen
	began := r.moment()
	r.o.Ledger.View(func(s *ledger.State) {
		for _, g := range r.held(s, c, ledger.Active) {
			r.sawOf(g, confirmed)
		}
	})
	observed, err := r.observe(ctx, c)
	if err != nil {
		return view{corner: c}, err
	}
	now := r.o.Clock.Now()
	v := r.desire(c)
	v.began, v.observed = began, observed
	r.saw(v)
	v.observed = append(v.observed, r.missing(ctx, v, confirmed)...)
	v.plan = Plan(v.desired, v.ending, v.observed, v.instances, now)
	v.confirm()
	return v, nil
}

// moment is later than all before it.
func (r *Reconciler) moment() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.moments++
	return r.moments
}

func (r *Reconciler) observe(ctx context.Context, c corner) ([]Observed, error) {
	ctx, cancel := context.WithTimeout(ctx, r.o.ObserveTimeout)
	defer cancel()
	seen, err := r.appliers[c.kind].Observe(ctx, c.vm)
	if err != nil {
		return nil, fmt.Errorf("cannot observe %s of VM %s: %w", c.kind, c.vm, err)
	}
	return seen, nil
}

// confirm plans to apply once more what is there already while a grant that owns
// it is pending: its broker stopped before it could say so, and that is how the
// next one learns the outcome.
func (v *view) confirm() {
	state := make(map[uuid.UUID]ledger.GrantState, len(v.grants))
	for _, g := range v.grants {
		state[g.ID] = g.State
	}
	planned := make(map[string]bool, len(v.plan))
	for _, a := range v.plan {
		planned[a.Object.ID] = true
	}
	seen := v.seen()
	var more []Action
	for _, d := range v.desired {
		at := seen[d.ID].Presence
		present := at == Present || at == Arriving
		pending := slices.ContainsFunc(d.Owners, func(g uuid.UUID) bool { return state[g] == ledger.Pending })
		if present && pending && !planned[d.ID] {
			d.Instance = v.instances[v.corner.vm]
			more = append(more, Action{Verb: Apply, Object: d, Why: "its grant is not confirmed"})
		}
	}
	wait := slices.IndexFunc(v.plan, func(a Action) bool { return a.Verb == Wait })
	if wait < 0 {
		wait = len(v.plan)
	}
	v.plan = slices.Insert(v.plan, wait, more...)
}

// sawOf tells where the objects of an active grant were last seen: in the run in
// which it became active, or, of a grant that persists, in a later one.
func (r *Reconciler) sawOf(g ledger.Grant, where map[string]sight) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, o := range r.kinds[g.Capability.Kind].Objects(g) {
		at, ok := r.seen[o.ID]
		if !ok {
			at = sight{g.Instance, max(o.Generation, where[o.ID].generation)}
		}
		where[o.ID] = at
	}
}

// saw notes where the objects of live grants are.
func (r *Reconciler) saw(v view) {
	desired := byID(v.desired)
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, o := range v.observed {
		if _, wanted := desired[o.ID]; wanted && o.Presence == Present {
			r.seen[o.ID] = sight{o.Instance, o.Generation}
		}
	}
}

// missing reports as gone what an active grant was confirmed to have in this
// run of its VM and nobody sees any more. What was there only in an older
// generation has yet to be made.
func (r *Reconciler) missing(ctx context.Context, v view, confirmed map[string]sight) []Observed {
	instance := v.instances[v.corner.vm]
	if instance == "" {
		return nil
	}
	seen := v.seen()
	var out []Observed
	for _, d := range v.desired {
		at, ok := confirmed[d.ID]
		_, there := seen[d.ID]
		if !ok || there || at.run != instance || at.generation < d.Generation && r.remade(d, at) || !r.goesOn(ctx, d, instance) {
			continue
		}
		out = append(out, Observed{
			ID: d.ID, Kind: d.Kind, VM: d.VM, Instance: instance, Generation: d.Generation,
			Presence: Gone, Detail: "what served it has ended",
		})
	}
	return out
}

// remade tells whether a newer generation of an object is another thing, and not
// the same with, say, a later deadline.
func (r *Reconciler) remade(d Object, at sight) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(d.Needs) > 0 || len(d.Owners) > 1 || r.floors[d.ID] > at.generation
}

// goesOn tells whether the run of an object's VM goes on. If it does, what was
// seen before was seen in that run.
func (r *Reconciler) goesOn(ctx context.Context, o Object, instance string) bool {
	teller, ok := r.appliers[o.Kind].(RunTeller)
	if !ok {
		return true
	}
	ctx, cancel := context.WithTimeout(ctx, r.o.ObserveTimeout)
	defer cancel()
	now, err := teller.Run(ctx, o.VM)
	return err == nil && now == instance
}
