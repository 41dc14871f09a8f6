package reconcile

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/capabilities"
)

// Object is something real that one or more grants need, such as a directory
// that is shared with a VM.
type Object struct {
	// ID names the object for ever; it is never used for another one.
	ID string
	// Kind selects the applier.
	Kind string
	// VM is the machine in which the object exists.
	VM uuid.UUID
	// Instance is the run of the VM that the object belongs to. Empty: any.
	Instance string
	// Owners are the grants that need the object, sorted. Of one generation they
	// only become fewer: who is not among them any more does not come back.
	Owners []uuid.UUID
	// Needs are the VMs, sorted, that must run besides VM. While one of them does
	// not the object waits, and is withdrawn where it is there.
	Needs []uuid.UUID
	// Generation grows with every change of the owners' desired state, and with
	// every run of a VM that the object needs. An applier refuses one that is
	// older than what it has seen.
	Generation uint64
	// Deadline is when the object ends by itself; zero means never.
	Deadline capabilities.Deadline
	// Capability says what the object gives; of an object that grants share, what
	// it gives to the first of its owners.
	Capability capabilities.Capability
	// Label is how the object is named inside the VM.
	Label string
}

// Presence says how much of an object exists.
type Presence string

const (
	// Present: the object is whole and usable.
	Present Presence = "present"
	// Arriving: it is being made.
	Arriving Presence = "arriving"
	// Leaving: it is being taken away and may still give access.
	Leaving Presence = "leaving"
	// Gone: nothing that could give access is left.
	Gone Presence = "gone"
)

// Observed is what an applier found in the world.
type Observed struct {
	ID         string
	Kind       string
	VM         uuid.UUID
	Instance   string
	Generation uint64
	Presence   Presence
	// Detail says what is unusual about the object, for people.
	Detail string
	// Deadline is when it will end by itself, where the applier moves
	// deadlines.
	Deadline capabilities.Deadline
	// Owners are the grants for which it is there, of an object that grants can
	// share. Nil: the applier cannot tell.
	Owners []uuid.UUID
}

// Verb is what an [Action] does to its object.
type Verb string

// The verbs, in the order in which a plan has them.
const (
	// Withdraw takes the object away.
	Withdraw Verb = "withdraw"
	// Release takes the object from grants that have ended and leaves it to the
	// others that own it.
	Release Verb = "release"
	// Extend moves the deadline of an object that stays as it is.
	Extend Verb = "extend"
	// Apply makes the object.
	Apply Verb = "apply"
	// Wait does nothing: something else must be there first.
	Wait Verb = "wait"
)

// Cuts tells whether the verb takes something away.
func (v Verb) Cuts() bool { return v == Withdraw || v == Release }

// Action is one step of a plan.
type Action struct {
	Verb   Verb
	Object Object
	// Why names the reason, for people and for the audit.
	Why string
	// Ended are the grants, sorted, that have nothing of the object any more once
	// the step is done.
	Ended []uuid.UUID
	// generation is that which Ended had of the object.
	generation uint64
	// again is the generation in which the object is made for those who are left,
	// also when nothing tells any more that others had it.
	again uint64
}

func (a Action) corner() corner { return corner{a.Object.VM, a.Object.Kind} }

// String is the action as `spectrum-cap explain` prints it.
func (a Action) String() string {
	what := a.Object.ID
	if a.Object.Capability.Resource != nil {
		what += " (" + a.Object.Capability.String() + ")"
	}
	return fmt.Sprintf("%s %s on VM %s: %s", a.Verb, what, a.Object.VM, a.Why)
}

// Kind turns the grants of one kind of capability into objects. It is pure.
type Kind interface {
	// Kind is the capability kind, such as "fs".
	Kind() string
	// Objects returns the objects that a live grant needs, all of them in the VM
	// that holds it. The generation of an object that no other grant can own is
	// the grant's; of one that grants can share it is [ledger.Grant.Changed],
	// which is ordered across grants.
	Objects(g ledger.Grant) []Object
}

// Objects returns, sorted by id, the objects that live grants need. Grants
// that share an object are merged: the owners and what they need add up, the
// newest generation counts, the object ends when its last owner does, and
// belongs to a run only if all of its owners do.
//
// live tells whether a grant (and so every ancestor of it) is in force.
func Objects(kinds map[string]Kind, grants []ledger.Grant, live func(ledger.Grant) bool) []Object {
	grants = slices.Clone(grants)
	slices.SortFunc(grants, func(a, b ledger.Grant) int { return byUUID(a.ID, b.ID) })
	byID := map[string]*Object{}
	for _, g := range grants {
		k, ok := kinds[g.Capability.Kind]
		if !ok || !live(g) {
			continue
		}
		for _, o := range k.Objects(g) {
			have, ok := byID[o.ID]
			if !ok {
				o.Owners = []uuid.UUID{g.ID}
				o.Needs = union(o.Needs, nil)
				byID[o.ID] = &o
				continue
			}
			have.Owners = append(have.Owners, g.ID)
			have.Needs = union(have.Needs, o.Needs)
			have.Generation = max(have.Generation, o.Generation)
			have.Deadline = later(have.Deadline, o.Deadline)
			if have.Instance != o.Instance {
				have.Instance = ""
			}
		}
	}
	out := make([]Object, 0, len(byID))
	for _, o := range byID {
		out = append(out, *o)
	}
	slices.SortFunc(out, func(a, b Object) int { return cmp.Compare(a.ID, b.ID) })
	return out
}

func byUUID(a, b uuid.UUID) int { return bytes.Compare(a[:], b[:]) }

// union is a and b together, sorted.
func union(a, b []uuid.UUID) []uuid.UUID {
	if len(a) == 0 && len(b) == 0 {
		return nil
	}
	out := slices.Concat(a, b)
	slices.SortFunc(out, byUUID)
	return slices.Compact(out)
}

// later is the deadline that leaves the object standing longer.
func later(a, b capabilities.Deadline) capabilities.Deadline {
	if a.IsZero() || b.IsZero() {
		return capabilities.Deadline{}
	}
	if c := cmp.Or(a.Wall.Compare(b.Wall), cmp.Compare(a.Boot, b.Boot), cmp.Compare(a.BootID, b.BootID)); c < 0 {
		return b
	}
	return a
}

// raise gives each object that an ended grant owned with others a generation
// which is newer than all that this grant was part of: the end of one owner
// changes what the others have.
func raise(desired, ending []Object) []Object {
	newest := make(map[string]uint64, len(ending))
	for _, e := range ending {
		newest[e.ID] = max(newest[e.ID], e.Generation)
	}
	desired = slices.Clone(desired)
	for i := range desired {
		desired[i].Generation = max(desired[i].Generation, newest[desired[i].ID])
	}
	return desired
}

// waitsFor says what must be there before an object can be made, or "". over
// tells that it belongs to a run that has ended, so that nothing is to come.
func waitsFor(o Object, instances map[uuid.UUID]string) (why string, needs, over bool) {
	for _, vm := range o.Needs {
		if _, runs := instances[vm]; !runs {
			return fmt.Sprintf("it needs VM %s, which does not run", vm), true, false
		}
	}
	instance, runs := instances[o.VM]
	switch {
	case !runs:
		return "its VM does not run", false, o.Instance != ""
	case o.Instance != "" && o.Instance != instance:
		return "the run of its VM is over", false, true
	}
	return "", false, false
}

// Plan returns what must be done so that observed becomes desired: first all that
// takes something away, then the extensions, then the applications, then what
// waits, each sorted by object id. It is pure, and the order of its input does not show.
//
// ending are the objects of grants that have ended and are not yet known to be
// gone. They are withdrawn even where nothing of them is observed: an
// application that is still under way may make one appear after the
// observation, and only a withdrawal with a newer generation forbids that. Where
// others own the object too it is released: applied for those who are left. If
// nothing of it is observed, all that is older than that is forbidden.
//
// instances holds the current run of every VM that is running; an object whose
// VM does not run, or that needs another one that does not, waits.
func Plan(desired, ending []Object, observed []Observed, instances map[uuid.UUID]string, now capabilities.Instant) []Action {
	p := plan{want: map[string]Object{}, have: map[string]Observed{}, done: map[string]int{}, instances: instances, now: now}
	for _, o := range raise(desired, ending) {
		p.want[o.ID] = o
	}
	for _, o := range observed {
		p.have[o.ID] = o
	}
	for _, e := range ending {
		p.end(e)
	}
	for _, o := range observed {
		p.found(o)
	}
	for _, w := range p.want {
		p.need(w)
	}
	byID := func(a, b Action) int { return cmp.Compare(a.Object.ID, b.Object.ID) }
	for _, actions := range [][]Action{p.cut, p.extend, p.apply, p.wait} {
		slices.SortFunc(actions, byID)
	}
	return slices.Concat(p.cut, p.extend, p.apply, p.wait)
}

// plan is one being made.
type plan struct {
	want      map[string]Object
	have      map[string]Observed
	instances map[uuid.UUID]string
	now       capabilities.Instant

	cut, extend, apply, wait []Action

	done map[string]int // by object from which something is taken, the place in cut
}

func (p *plan) take(a Action) {
	if _, done := p.done[a.Object.ID]; !done {
		p.done[a.Object.ID] = len(p.cut)
		p.cut = append(p.cut, a)
	}
}

// end plans for an object of grants that have ended.
func (p *plan) end(e Object) {
	a := Action{Verb: Withdraw, Object: e, Why: "its grant has ended", Ended: e.Owners, generation: e.Generation}
	// What is there may be newer than what is left of those who asked for it.
	o, seen := p.have[e.ID]
	a.Object.Generation = max(e.Generation, o.Generation)
	if w, shared := p.want[e.ID]; shared && !w.Deadline.Passed(p.now) {
		w.Generation = max(w.Generation, o.Generation)
		a.Object, a.Why = w, "a grant that owned it has ended, and others need it"
		_, unmet, _ := waitsFor(w, p.instances)
		switch there := seen && (o.Presence == Present || o.Presence == Arriving); {
		case there && unmet: // it is withdrawn from all
		case there && o.Owners != nil && o.Generation >= w.Generation && !sharesAny(o.Owners, e.Owners):
			return
		case there:
			a.Verb = Release
			a.Object.Instance = o.Instance
		default:
			a = a.past("a grant that owned it has ended; what was to be made for it must not come late")
			a.Object.Generation = max(a.Object.Generation, o.Generation)
		}
	}
	p.take(a)
}

// past is the withdrawal of all that is older than the action's object.
func (a Action) past(why string) Action {
	a.Verb, a.Why, a.again = Withdraw, why, a.Object.Generation
	a.Object.Generation--
	return a
}

// sharesAny tells whether any of a is among b, which is sorted.
func sharesAny(a, b []uuid.UUID) bool {
	return slices.ContainsFunc(a, func(id uuid.UUID) bool { return among(b, id) })
}

// among tells whether an id is among some that are sorted.
func among(sorted []uuid.UUID, id uuid.UUID) bool {
	_, found := slices.BinarySearchFunc(sorted, id, byUUID)
	return found
}

// found plans for what is there and should not be.
func (p *plan) found(o Observed) {
	if o.Presence == Gone {
		return
	}
	w, ok := p.want[o.ID]
	if !ok {
		p.take(Action{Verb: Withdraw, Why: "no live grant owns it", Object: Object{
			ID: o.ID, Kind: o.Kind, VM: o.VM, Instance: o.Instance, Generation: o.Generation,
		}})
		return
	}
	newest := w
	newest.Generation = max(w.Generation, o.Generation)
	why, unmet, _ := waitsFor(w, p.instances)
	strangers := slices.DeleteFunc(slices.Clone(o.Owners), func(id uuid.UUID) bool { return among(w.Owners, id) })
	switch {
	case w.Deadline.Passed(p.now):
		p.take(Action{Verb: Withdraw, Object: newest, Why: "its lease has ended", Ended: w.Owners, generation: w.Generation})
	case unmet:
		p.take(Action{Verb: Withdraw, Object: newest, Why: why})
	case len(strangers) > 0 && (o.Presence == Present || o.Presence == Arriving):
		newest.Instance = o.Instance
		p.take(Action{Verb: Release, Object: newest, Why: fmt.Sprintf("grant %s does not own it", strangers[0])})
	}
}

// need plans for what should be there.
func (p *plan) need(w Object) {
	if w.Deadline.Passed(p.now) {
		return
	}
	if why, _, over := waitsFor(w, p.instances); why != "" {
		if !over {
			p.wait = append(p.wait, Action{Verb: Wait, Object: w, Why: why})
		}
		return
	}
	var cut Action
	if i, ok := p.done[w.ID]; ok {
		cut = p.cut[i]
	}
	if cut.Verb == Release {
		return
	}
	w.Instance = p.instances[w.VM]
	o, ok := p.have[w.ID]
	switch {
	case !ok:
		p.apply = append(p.apply, Action{Verb: Apply, Object: w, Why: "a live grant needs it"})
	case o.Presence == Leaving && (cut.Verb != Withdraw || cut.Object.Generation >= w.Generation):
		// What is leaving must be gone before it can be made again.
	case o.Presence == Gone && o.Generation >= w.Generation:
		// It was lost. Its grants end; a guest is never given a device
		// back that it had and lost.
	case o.Generation < w.Generation && o.Presence != Gone && !o.Deadline.Equal(w.Deadline) && sameButTheDeadline(o, w):
		p.extend = append(p.extend, Action{Verb: Extend, Object: w, Why: "its lease was renewed" + until(w.Deadline)})
	case o.Generation < w.Generation:
		p.apply = append(p.apply, Action{Verb: Apply, Object: w, Why: fmt.Sprintf("generation %d replaces %d", w.Generation, o.Generation)})
	}
}

// sameButTheDeadline tells whether what is there is what is wanted, but for its
// deadline: another owner, or another run of a VM that it needs, asks for more.
func sameButTheDeadline(o Observed, w Object) bool {
	if len(w.Needs) > 0 {
		return false
	}
	if o.Owners == nil {
		return len(w.Owners) <= 1
	}
	return slices.Equal(union(o.Owners, nil), w.Owners)
}

func until(d capabilities.Deadline) string {
	if d.IsZero() {
		return " without an end"
	}
	return " until " + d.Wall.UTC().Format(time.RFC3339)
}
