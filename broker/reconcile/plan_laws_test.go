package reconcile

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/google/uuid"
	"pgregory.net/rapid"

	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/capabilities"
)

// world is any combination of grants, some of them ended, that share objects or
// do not, and of what is there.
type world struct {
	grants   []ledger.Grant
	ended    map[uuid.UUID]bool
	observed []Observed
	running  map[uuid.UUID]string
}

func drawWorld(t *rapid.T) world {
	w := world{running: map[uuid.UUID]string{}, ended: map[uuid.UUID]bool{}}
	for _, vm := range []uuid.UUID{vm1, vm2, vm3} {
		if rapid.Bool().Draw(t, "running") {
			w.running[vm] = "run"
		}
	}
	seq := uint64(1)
	for i := range rapid.IntRange(0, 6).Draw(t, "objects") {
		label := fmt.Sprintf("%s%d", rapid.SampledFrom([]string{"plain", "needs"}).Draw(t, "label"), i)
		vm := rapid.SampledFrom([]uuid.UUID{vm1, vm2}).Draw(t, "vm")
		var owners []uuid.UUID
		for range rapid.IntRange(0, 3).Draw(t, "owners") {
			seq++
			g := ledger.Grant{ID: drawID(t), Holder: vm, Label: label, Changed: seq, Capability: capabilities.Capability{Kind: "shared"}}
			if rapid.Bool().Draw(t, "lease") {
				g.Deadline = capabilities.Deadline{Wall: now.Wall.Add(time.Duration(rapid.IntRange(-2, 2).Draw(t, "left")) * time.Second)}
			}
			w.ended[g.ID] = rapid.Bool().Draw(t, "ended")
			w.grants = append(w.grants, g)
			owners = append(owners, g.ID)
		}
		if _, running := w.running[vm]; running && rapid.Bool().Draw(t, "seen") {
			o := Observed{
				ID: "o-" + label, Kind: "shared", VM: vm, Instance: "run", Generation: rapid.Uint64Range(1, seq).Draw(t, "seen generation"),
				Presence: rapid.SampledFrom([]Presence{Present, Arriving, Leaving, Gone}).Draw(t, "presence"),
			}
			if rapid.Bool().Draw(t, "tells owners") {
				o.Owners = append([]uuid.UUID{}, owners...)
				if rapid.Bool().Draw(t, "a stranger") {
					o.Owners = append(o.Owners, drawID(t))
				}
			}
			w.observed = append(w.observed, o)
		}
	}
	return w
}

func drawID(t *rapid.T) (id uuid.UUID) {
	copy(id[:], rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "id"))
	return id
}

func (w world) plan() []Action {
	kinds := map[string]Kind{"shared": shared{}}
	desired := Objects(kinds, w.grants, func(g ledger.Grant) bool { return !w.ended[g.ID] })
	ending := Objects(kinds, w.grants, func(g ledger.Grant) bool { return w.ended[g.ID] })
	return Plan(desired, ending, w.observed, w.running, now)
}

// carryOut is a model of appliers: each refuses what is older than what it has
// seen.
func (w world) carryOut(t *rapid.T, plan []Action) world {
	there := map[string]Observed{}
	for _, o := range w.observed {
		there[o.ID] = o
	}
	barred := map[string]uint64{}
	for _, a := range plan {
		o := a.Object
		have, ok := there[o.ID]
		if a.Verb != Wait && ok && have.Presence != Gone && o.Generation < have.Generation {
			t.Fatalf("%s in generation %d comes after %d", a, o.Generation, have.Generation)
		}
		switch a.Verb {
		case Withdraw:
			delete(there, o.ID)
			if ok && (have.Presence == Leaving || have.Presence == Gone) { // the guest let it go by itself
				have.Presence = Gone
				there[o.ID] = have
			}
			barred[o.ID] = max(barred[o.ID], o.Generation)
		case Release, Extend, Apply:
			if o.Generation <= barred[o.ID] {
				t.Fatalf("%s in generation %d, which was withdrawn", a, o.Generation)
			}
			there[o.ID] = Observed{ID: o.ID, Kind: o.Kind, VM: o.VM, Instance: o.Instance, Generation: o.Generation, Presence: Present, Owners: o.Owners, Deadline: o.Deadline}
		}
	}
	next := w
	next.observed, next.grants = nil, nil
	for _, o := range there {
		next.observed = append(next.observed, o)
	}
	for _, g := range w.grants {
		gone := slices.ContainsFunc(plan, func(a Action) bool { return slices.Contains(a.Ended, g.ID) })
		parted := slices.ContainsFunc(w.observed, func(o Observed) bool {
			return o.ID == "o-"+g.Label && o.Owners != nil && !slices.Contains(o.Owners, g.ID)
		})
		if !gone && (!w.ended[g.ID] || !parted) {
			next.grants = append(next.grants, g)
		}
	}
	return next
}

func TestPlanLaws(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := drawWorld(t)
		plan := w.plan()

		shuffled := w
		shuffled.grants, shuffled.observed = rapid.Permutation(w.grants).Draw(t, "g"), rapid.Permutation(w.observed).Draw(t, "o")
		if again := shuffled.plan(); fmt.Sprintf("%+v", plan) != fmt.Sprintf("%+v", again) {
			t.Fatalf("the order of the input shows:\n%+v\n%+v", plan, again)
		}
		rank := map[Verb]int{Withdraw: 0, Release: 0, Extend: 1, Apply: 2, Wait: 3}
		if !slices.IsSortedFunc(plan, func(a, b Action) int { return rank[a.Verb] - rank[b.Verb] }) {
			t.Fatalf("what takes away does not come first: %v", plan)
		}
		live := func(object string) bool {
			return slices.ContainsFunc(w.grants, func(g ledger.Grant) bool {
				return "o-"+g.Label == object && !w.ended[g.ID] && !g.Deadline.Passed(now)
			})
		}
		for _, a := range plan {
			for _, g := range a.Object.Owners {
				if a.Verb != Withdraw && w.ended[g] {
					t.Fatalf("%s for grant %s, which has ended", a, g)
				}
			}
			if a.Verb != Apply && a.Verb != Extend {
				continue
			}
			for _, vm := range append([]uuid.UUID{a.Object.VM}, a.Object.Needs...) {
				if _, running := w.running[vm]; !running {
					t.Fatalf("%s although VM %s does not run", a, vm)
				}
			}
			if !live(a.Object.ID) {
				t.Fatalf("%s, which no live grant owns", a)
			}
		}
		cut := func(object string) bool {
			return slices.ContainsFunc(plan, func(a Action) bool { return a.Verb.Cuts() && a.Object.ID == object })
		}
		for _, o := range w.observed {
			if o.Presence != Gone && !live(o.ID) && !cut(o.ID) {
				t.Fatalf("%+v gives access, nobody wants it, and the plan leaves it: %v", o, plan)
			}
		}
		for _, g := range w.grants {
			if !w.ended[g.ID] {
				continue
			}
			without := slices.ContainsFunc(w.observed, func(o Observed) bool {
				return o.ID == "o-"+g.Label && o.Owners != nil && !slices.Contains(o.Owners, g.ID)
			})
			if !without && !cut("o-"+g.Label) {
				t.Fatalf("grant %s has ended, and the plan leaves it what it has: %v", g.ID, plan)
			}
		}
		// Carried out, the plan leaves nothing to do. Withdrawals come first, so
		// what they are about is settled before anything is made.
		after := w.carryOut(t, plan)
		rest := slices.DeleteFunc(after.plan(), func(a Action) bool { return a.Verb == Wait })
		if len(rest) != 0 {
			t.Fatalf("after %v there is still %v", plan, rest)
		}
	})
}
