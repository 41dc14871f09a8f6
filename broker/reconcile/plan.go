package reconcile

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
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
	// Owners are the grants that need the object, sorted.
	Owners []uuid.UUID
	// Generation grows with every change of the owners' desired state. An
	// applier refuses one that is older than what it has seen.
	Generation uint64
	// Deadline is when the object ends by itself; zero means never.
	Deadline capabilities.Deadline
	// Capability says what the object gives.
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
	// Deadline is when it will end by itself, where the applier moves
	// deadlines.
	Deadline capabilities.Deadline
	// Detail says what is unusual about the object, for people.
	Detail string
}

// Verb is what an [Action] does to its object.
type Verb string

const (
	Withdraw Verb = "withdraw"
	Apply    Verb = "apply"
	// Extend moves the deadline of an object that stays as it is.
	Extend Verb = "extend"
)

// Action is one step of a plan.
type Action struct {
	Verb   Verb
	Object Object
	// Why names the reason, for people and for the audit.
	Why string
}

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
	// Objects returns the objects that a live grant needs.
	Objects(g ledger.Grant) []Object
}

// Objects returns, sorted by id, the objects that live grants need. Grants
// that share an object are merged: the owners add up, the newest generation
// counts, and the object ends when its last owner does.
//
// live tells whether a grant (and so every ancestor of it) is in force.
func Objects(kinds map[string]Kind, grants []ledger.Grant, live func(ledger.Grant) bool) []Object {
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
				byID[o.ID] = &o
				continue
			}
			have.Owners = append(have.Owners, g.ID)
			have.Generation = max(have.Generation, o.Generation)
			have.Deadline = later(have.Deadline, o.Deadline)
		}
	}
	out := make([]Object, 0, len(byID))
	for _, o := range byID {
		slices.SortFunc(o.Owners, func(a, b uuid.UUID) int { return strings.Compare(a.String(), b.String()) })
		out = append(out, *o)
	}
	slices.SortFunc(out, func(a, b Object) int { return cmp.Compare(a.ID, b.ID) })
	return out
}

// later is the deadline that leaves the object standing longer.
func later(a, b capabilities.Deadline) capabilities.Deadline {
	if a.IsZero() || b.IsZero() {
		return capabilities.Deadline{}
	}
	if b.Wall.After(a.Wall) {
		return b
	}
	return a
}

// Plan returns what must be done so that observed becomes desired: every
// withdrawal first, then the extensions, then the applications, each sorted by
// object id.
//
// ending are the objects of grants that have ended and are not yet known to be
// gone. They are withdrawn even where nothing of them is observed: an
// application that is still under way may make one appear after the
// observation, and only a withdrawal with a newer generation forbids that.
//
// instances holds the current run of every VM that is running; an object whose
// VM does not run waits, and is in no action.
func Plan(desired, ending []Object, observed []Observed, instances map[uuid.UUID]string, now capabilities.Instant) []Action {
	want := make(map[string]Object, len(desired))
	for _, o := range desired {
		want[o.ID] = o
	}
	have := make(map[string]Observed, len(observed))
	var withdraw, extend, apply []Action
	ends := map[string]bool{}
	for _, o := range ending {
		if _, ok := want[o.ID]; !ok && !ends[o.ID] {
			ends[o.ID] = true
			withdraw = append(withdraw, Action{Withdraw, o, "its grant has ended"})
		}
	}
	for _, o := range observed {
		have[o.ID] = o
		if o.Presence == Gone || ends[o.ID] {
			continue
		}
		w, ok := want[o.ID]
		switch {
		case !ok:
			withdraw = append(withdraw, Action{Withdraw, Object{
				ID: o.ID, Kind: o.Kind, VM: o.VM, Instance: o.Instance, Generation: o.Generation,
			}, "no live grant owns it"})
		case w.Deadline.Passed(now):
			w.Generation = max(w.Generation, o.Generation)
			withdraw = append(withdraw, Action{Withdraw, w, "its lease has ended"})
		}
	}
	for _, w := range desired {
		instance, running := instances[w.VM]
		if !running || w.Deadline.Passed(now) || (w.Instance != "" && w.Instance != instance) {
			continue
		}
		w.Instance = instance
		o, ok := have[w.ID]
		switch {
		case !ok:
			apply = append(apply, Action{Apply, w, "a live grant needs it"})
		case o.Presence == Leaving:
			// What is leaving must be gone before it can be made again.
		case o.Presence == Gone && o.Generation >= w.Generation:
			// It was lost. Its grants end; a guest is never given a device
			// back that it had and lost.
		case o.Generation < w.Generation && o.Presence != Gone && !o.Deadline.Equal(w.Deadline):
			extend = append(extend, Action{Extend, w, "its lease was renewed" + until(w.Deadline)})
		case o.Generation < w.Generation:
			apply = append(apply, Action{Apply, w, fmt.Sprintf("generation %d replaces %d", w.Generation, o.Generation)})
		}
	}
	byID := func(a, b Action) int { return cmp.Compare(a.Object.ID, b.Object.ID) }
	slices.SortFunc(withdraw, byID)
	slices.SortFunc(extend, byID)
	slices.SortFunc(apply, byID)
	return slices.Concat(withdraw, extend, apply)
}

func until(d capabilities.Deadline) string {
	if d.IsZero() {
		return " without an end"
	}
	return " until " + d.Wall.UTC().Format(time.RFC3339)
}
