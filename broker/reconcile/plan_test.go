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

var (
	vm1 = uuid.MustParse("11111111-1111-4111-8111-111111111111")
	vm2 = uuid.MustParse("22222222-2222-4222-8222-222222222222")
	now = capabilities.Instant{Wall: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC), BootID: "b", Boot: time.Hour}
)

// shared is a kind in which all grants of one label share an object.
type shared struct{}

func (shared) Kind() string { return "shared" }

func (shared) Objects(g ledger.Grant) []Object {
	return []Object{{ID: "o-" + g.Label, Kind: "shared", VM: g.Holder, Generation: g.Generation, Deadline: g.Deadline}}
}

func alive(ledger.Grant) bool { return true }

func TestObjectsMergesOwners(t *testing.T) {
	short := capabilities.NewDeadline(now, time.Minute)
	long := capabilities.NewDeadline(now, time.Hour)
	grant := func(gen uint64, d capabilities.Deadline) ledger.Grant {
		return ledger.Grant{ID: uuid.New(), Holder: vm1, Label: "nic", Generation: gen, Deadline: d, Capability: capabilities.Capability{Kind: "shared"}}
	}
	a, b := grant(3, short), grant(1, long)
	got := Objects(map[string]Kind{"shared": shared{}}, []ledger.Grant{a, b}, alive)
	if len(got) != 1 {
		t.Fatalf("%d objects, want the one that both grants share", len(got))
	}
	if len(got[0].Owners) != 2 || got[0].Generation != 3 || got[0].Deadline != long {
		t.Errorf("owners %v, generation %d, deadline %v; want both owners, 3, the later one", got[0].Owners, got[0].Generation, got[0].Deadline)
	}
	got = Objects(map[string]Kind{"shared": shared{}}, []ledger.Grant{a, b}, func(g ledger.Grant) bool { return g.ID != b.ID })
	if len(got) != 1 || len(got[0].Owners) != 1 || got[0].Owners[0] != a.ID || got[0].Deadline != short {
		t.Errorf("got %+v; a dead grant must own nothing", got)
	}
	forever := grant(1, capabilities.Deadline{})
	got = Objects(map[string]Kind{"shared": shared{}}, []ledger.Grant{a, forever}, alive)
	if !got[0].Deadline.IsZero() {
		t.Errorf("deadline %v; an owner without one keeps the object", got[0].Deadline)
	}
}

func TestPlanCases(t *testing.T) {
	running := map[uuid.UUID]string{vm1: "run-1"}
	object := Object{ID: "o", Kind: "shared", VM: vm1, Generation: 2}
	seen := Observed{ID: "o", Kind: "shared", VM: vm1, Generation: 2, Presence: Present}
	with := func(o Observed, change func(*Observed)) Observed { change(&o); return o }
	ended := object
	ended.Generation = 3
	expired := object
	expired.Deadline = capabilities.Deadline{Wall: now.Wall.Add(-time.Second)}
	leased := object
	leased.Deadline = capabilities.Deadline{Wall: now.Wall.Add(time.Hour)}
	otherRun := object
	otherRun.Instance = "run-0"
	for _, c := range []struct {
		name            string
		desired, ending []Object
		observed        []Observed
		running         map[uuid.UUID]string
		want            string
	}{
		{"nothing", nil, nil, nil, running, ""},
		{"missing is applied", []Object{object}, nil, nil, running, "apply o"},
		{"present is left alone", []Object{object}, nil, []Observed{seen}, running, ""},
		{"older is applied again", []Object{object}, nil, []Observed{with(seen, func(o *Observed) { o.Generation = 1 })}, running, "apply o"},
		{"renewed is extended", []Object{leased}, nil, []Observed{with(seen, func(o *Observed) { o.Generation = 1 })}, running, "extend o"},
		{"renewed without an end is extended", []Object{object}, nil, []Observed{with(seen, func(o *Observed) { o.Generation, o.Deadline = 1, leased.Deadline })}, running, "extend o"},
		{"renewed is extended while it arrives", []Object{leased}, nil, []Observed{with(seen, func(o *Observed) { o.Generation, o.Presence = 1, Arriving })}, running, "extend o"},
		{"renewed and leaving is waited for", []Object{leased}, nil, []Observed{with(seen, func(o *Observed) { o.Generation, o.Presence = 1, Leaving })}, running, ""},
		{"another deadline of the same generation is left alone", []Object{leased}, nil, []Observed{seen}, running, ""},
		{"orphan is withdrawn", nil, nil, []Observed{seen}, running, "withdraw o"},
		{"what a guest lost is not given back", []Object{object}, nil, []Observed{with(seen, func(o *Observed) { o.Presence = Gone })}, running, ""},
		{"leaving is waited for", []Object{object}, nil, []Observed{with(seen, func(o *Observed) { o.Presence = Leaving })}, running, ""},
		{"ended is withdrawn although nobody sees it", nil, []Object{ended}, nil, running, "withdraw o"},
		{"ended is withdrawn once", nil, []Object{ended, ended}, []Observed{seen}, running, "withdraw o"},
		{"expired is withdrawn", []Object{expired}, nil, []Observed{seen}, running, "withdraw o"},
		{"expired is not applied", []Object{expired}, nil, nil, running, ""},
		{"a VM that does not run waits", []Object{object}, nil, nil, nil, ""},
		{"another run's object is not applied", []Object{otherRun}, nil, nil, running, ""},
		{"gone orphan is nothing", nil, nil, []Observed{with(seen, func(o *Observed) { o.Presence = Gone })}, running, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := ""
			for _, a := range Plan(c.desired, c.ending, c.observed, c.running, now) {
				got += fmt.Sprintf("%s %s", a.Verb, a.Object.ID)
				if a.Why == "" {
					t.Errorf("%s has no reason", a)
				}
			}
			if got != c.want {
				t.Errorf("plan is %q, want %q", got, c.want)
			}
		})
	}
}

// world draws any combination of desired, ending and observed objects.
type world struct {
	desired, ending []Object
	observed        []Observed
	running         map[uuid.UUID]string
}

func drawWorld(t *rapid.T) world {
	w := world{running: map[uuid.UUID]string{}}
	for _, vm := range []uuid.UUID{vm1, vm2} {
		if rapid.Bool().Draw(t, "running") {
			w.running[vm] = "run"
		}
	}
	for i := range rapid.IntRange(0, 8).Draw(t, "objects") {
		o := Object{
			ID: fmt.Sprintf("o%d", i), Kind: "shared", VM: rapid.SampledFrom([]uuid.UUID{vm1, vm2}).Draw(t, "vm"),
			Generation: rapid.Uint64Range(1, 3).Draw(t, "generation"),
		}
		if rapid.Bool().Draw(t, "lease") {
			o.Deadline = capabilities.Deadline{Wall: now.Wall.Add(time.Duration(rapid.IntRange(-2, 2).Draw(t, "left")) * time.Second)}
		}
		switch rapid.IntRange(0, 2).Draw(t, "wanted") {
		case 1:
			w.desired = append(w.desired, o)
		case 2:
			w.ending = append(w.ending, o)
		}
		if _, running := w.running[o.VM]; running && rapid.Bool().Draw(t, "seen") {
			w.observed = append(w.observed, Observed{
				ID: o.ID, Kind: o.Kind, VM: o.VM, Generation: rapid.Uint64Range(1, 3).Draw(t, "seen generation"),
				Presence: rapid.SampledFrom([]Presence{Present, Arriving, Leaving, Gone}).Draw(t, "presence"),
			})
		}
	}
	return w
}

func TestPlanLaws(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := drawWorld(t)
		plan := Plan(w.desired, w.ending, w.observed, w.running, now)

		shuffled := world{rapid.Permutation(w.desired).Draw(t, "d"), rapid.Permutation(w.ending).Draw(t, "e"), rapid.Permutation(w.observed).Draw(t, "o"), w.running}
		again := Plan(shuffled.desired, shuffled.ending, shuffled.observed, w.running, now)
		if fmt.Sprint(plan) != fmt.Sprint(again) {
			t.Fatalf("the order of the input shows:\n%v\n%v", plan, again)
		}
		order := []Verb{Withdraw, Extend, Apply}
		if !slices.IsSortedFunc(plan, func(a, b Action) int { return slices.Index(order, a.Verb) - slices.Index(order, b.Verb) }) {
			t.Fatalf("not first what is withdrawn, then what is extended, then what is applied: %v", plan)
		}
		for _, a := range plan {
			there := slices.ContainsFunc(w.observed, func(o Observed) bool {
				return o.ID == a.Object.ID && (o.Presence == Present || o.Presence == Arriving) && o.Generation < a.Object.Generation
			})
			if a.Verb == Extend && !there {
				t.Fatalf("%s, which is not there in an older generation", a)
			}
			wanted := slices.ContainsFunc(w.desired, func(o Object) bool { return o.ID == a.Object.ID && !o.Deadline.Passed(now) })
			if wanted != (a.Verb != Withdraw) {
				t.Fatalf("%s, although wanted is %v", a, wanted)
			}
			if _, running := w.running[a.Object.VM]; a.Verb != Withdraw && !running {
				t.Fatalf("%s on a VM that does not run", a)
			}
		}
		// Nothing that gives access without a live grant is left out.
		for _, o := range w.observed {
			wanted := slices.ContainsFunc(w.desired, func(d Object) bool { return d.ID == o.ID && !d.Deadline.Passed(now) })
			cut := slices.ContainsFunc(plan, func(a Action) bool { return a.Verb == Withdraw && a.Object.ID == o.ID })
			if o.Presence != Gone && !wanted && !cut {
				t.Fatalf("%+v gives access, nobody wants it, and the plan leaves it: %v", o, plan)
			}
		}
		// Carried out, the plan leaves nothing to do.
		var after []Observed
		for _, o := range w.observed {
			if !slices.ContainsFunc(plan, func(a Action) bool { return a.Object.ID == o.ID }) {
				after = append(after, o)
			}
		}
		for _, a := range plan {
			if a.Verb != Withdraw {
				after = append(after, Observed{ID: a.Object.ID, Kind: a.Object.Kind, VM: a.Object.VM, Generation: a.Object.Generation, Presence: Present, Deadline: a.Object.Deadline})
			}
		}
		if rest := Plan(w.desired, nil, after, w.running, now); len(rest) != 0 {
			t.Fatalf("after %v there is still %v", plan, rest)
		}
	})
}
