package reconcile

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/capabilities"
)

var (
	vm1 = uuid.MustParse("11111111-1111-4111-8111-111111111111")
	vm2 = uuid.MustParse("22222222-2222-4222-8222-222222222222")
	vm3 = uuid.MustParse("33333333-3333-4333-8333-333333333333")
	now = capabilities.Instant{Wall: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC), BootID: "b", Boot: time.Hour}
)

// shared is a kind in which all grants of one label share an object.
type shared struct{}

func (shared) Kind() string { return "shared" }

func (shared) Objects(g ledger.Grant) []Object {
	o := Object{ID: "o-" + g.Label, Kind: "shared", VM: g.Holder, Generation: g.Changed, Deadline: g.Deadline}
	if strings.HasPrefix(g.Label, "needs") {
		o.Needs = []uuid.UUID{vm3}
	}
	return []Object{o}
}

func alive(ledger.Grant) bool { return true }

func TestObjectsMergesOwners(t *testing.T) {
	short := capabilities.NewDeadline(now, time.Minute)
	long := capabilities.NewDeadline(now, time.Hour)
	grant := func(gen uint64, d capabilities.Deadline) ledger.Grant {
		return ledger.Grant{ID: uuid.New(), Holder: vm1, Label: "nic", Changed: gen, Deadline: d, Capability: capabilities.Capability{Kind: "shared"}}
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
	but := func(o Object, change func(*Object)) Object { change(&o); return o }
	ended := but(object, func(o *Object) { o.Generation = 3 })
	expired := but(object, func(o *Object) { o.Deadline = capabilities.Deadline{Wall: now.Wall.Add(-time.Second)} })
	leased := but(object, func(o *Object) { o.Deadline = capabilities.Deadline{Wall: now.Wall.Add(time.Hour)} })
	otherRun := but(object, func(o *Object) { o.Instance = "run-0" })
	needy := but(object, func(o *Object) { o.Needs = []uuid.UUID{vm2} })
	both := map[uuid.UUID]string{vm1: "run-1", vm2: "run-7"}
	a, b := uuid.MustParse("aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa"), uuid.MustParse("bbbbbbbb-bbbb-4bbb-8bbb-bbbbbbbbbbbb")
	ofA := but(object, func(o *Object) { o.Owners = []uuid.UUID{a} })
	endOfB := but(ended, func(o *Object) { o.Owners = []uuid.UUID{b} })
	for _, c := range []struct {
		name            string
		desired, ending []Object
		observed        []Observed
		running         map[uuid.UUID]string
		want            string // verb, object, generation
	}{
		{"nothing", nil, nil, nil, running, ""},
		{"missing is applied", []Object{object}, nil, nil, running, "apply o 2"},
		{"present is left alone", []Object{object}, nil, []Observed{seen}, running, ""},
		{"older is applied again", []Object{object}, nil, []Observed{with(seen, func(o *Observed) { o.Generation = 1 })}, running, "apply o 2"},
		{"renewed is extended", []Object{leased}, nil, []Observed{with(seen, func(o *Observed) { o.Generation = 1 })}, running, "extend o 2"},
		{"renewed without an end is extended", []Object{object}, nil, []Observed{with(seen, func(o *Observed) { o.Generation, o.Deadline = 1, leased.Deadline })}, running, "extend o 2"},
		{"renewed is extended while it arrives", []Object{leased}, nil, []Observed{with(seen, func(o *Observed) { o.Generation, o.Presence = 1, Arriving })}, running, "extend o 2"},
		{"renewed and leaving is waited for", []Object{leased}, nil, []Observed{with(seen, func(o *Observed) { o.Generation, o.Presence = 1, Leaving })}, running, ""},
		{"another deadline of the same generation is left alone", []Object{leased}, nil, []Observed{seen}, running, ""},
		{"renewed by a new owner is applied", []Object{but(leased, func(o *Object) { o.Owners = []uuid.UUID{a, b} })}, nil, []Observed{with(seen, func(o *Observed) { o.Generation = 1 })}, running, "apply o 2"},
		{"renewed for the same owners is extended", []Object{but(leased, func(o *Object) { o.Owners = []uuid.UUID{a, b} })}, nil, []Observed{with(seen, func(o *Observed) { o.Generation, o.Owners = 1, []uuid.UUID{b, a} })}, running, "extend o 2"},
		{"renewed and needing another VM is applied", []Object{but(leased, func(o *Object) { o.Needs = []uuid.UUID{vm2} })}, nil, []Observed{with(seen, func(o *Observed) { o.Generation = 1 })}, both, "apply o 2"},
		{"orphan is withdrawn", nil, nil, []Observed{seen}, running, "withdraw o 2"},
		{"what a guest lost is not given back", []Object{object}, nil, []Observed{with(seen, func(o *Observed) { o.Presence = Gone })}, running, ""},
		{"leaving is waited for", []Object{object}, nil, []Observed{with(seen, func(o *Observed) { o.Presence = Leaving })}, running, ""},
		{"ended is withdrawn although nobody sees it", nil, []Object{ended}, nil, running, "withdraw o 3"},
		{"ended is withdrawn once", nil, []Object{ended, ended}, []Observed{seen}, running, "withdraw o 3"},
		{"expired is withdrawn", []Object{expired}, nil, []Observed{seen}, running, "withdraw o 2"},
		{"expired is not applied", []Object{expired}, nil, nil, running, ""},
		{"a VM that does not run waits", []Object{object}, nil, nil, nil, "wait o 2"},
		{"another run's object is not applied", []Object{otherRun}, nil, nil, running, ""},
		{"another run's object does not wait", []Object{otherRun}, nil, nil, nil, ""},
		{"gone orphan is nothing", nil, nil, []Observed{with(seen, func(o *Observed) { o.Presence = Gone })}, running, ""},

		{"what a needed VM is missing for waits", []Object{needy}, nil, nil, running, "wait o 2"},
		{"what a needed VM runs for is applied", []Object{needy}, nil, nil, both, "apply o 2"},
		{"what a needed VM ended for is withdrawn", []Object{needy}, nil, []Observed{seen}, running, "withdraw o 2, wait o 2"},

		{"one of two owners ended", []Object{ofA}, []Object{endOfB}, []Observed{seen}, running, "release o 3"},
		{"the same, and it is applied for the other already", []Object{ofA}, []Object{endOfB}, []Observed{with(seen, func(o *Observed) { o.Generation = 3 })}, running, "release o 3"},
		{"the same, and the world says so", []Object{ofA}, []Object{endOfB}, []Observed{with(seen, func(o *Observed) { o.Generation, o.Owners = 3, []uuid.UUID{a} })}, running, ""},
		{"the same, and the world says no", []Object{ofA}, []Object{endOfB}, []Observed{with(seen, func(o *Observed) { o.Generation, o.Owners = 3, []uuid.UUID{a, b} })}, running, "release o 3"},
		{"one of two owners ended before it was there", []Object{ofA}, []Object{endOfB}, nil, running, "withdraw o 2, apply o 3"},
		{"one of two owners ended while it goes", []Object{ofA}, []Object{endOfB}, []Observed{with(seen, func(o *Observed) { o.Presence, o.Generation = Leaving, 3 })}, running, "withdraw o 3"},
		{"one of two owners ended, and so did a VM that it needs", []Object{but(needy, func(o *Object) { o.Owners = []uuid.UUID{a} })}, []Object{endOfB}, []Observed{seen}, running, "withdraw o 3, wait o 3"},
		{"it is there for a grant that does not own it", []Object{ofA}, nil, []Observed{with(seen, func(o *Observed) { o.Owners = []uuid.UUID{a, b} })}, running, "release o 2"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var got []string
			for _, a := range Plan(c.desired, c.ending, c.observed, c.running, now) {
				got = append(got, fmt.Sprintf("%s %s %d", a.Verb, a.Object.ID, a.Object.Generation))
				if a.Why == "" {
					t.Errorf("%s has no reason", a)
				}
			}
			if got := strings.Join(got, ", "); got != c.want {
				t.Errorf("plan is %q, want %q", got, c.want)
			}
		})
	}
}
