package ledger

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"fmt"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/clock"
)

// What of the state only links it, or says where in the log it is. Everything else
// must be carried from segment to segment: a field that is added is, or it is
// named here with the reason.
var derived = map[string]string{
	"layer.below":              "there is none",
	"layer.base":               "there is no layer below",
	"layer.changed":            "of layers above",
	"layer.ids":                "where a node is",
	"layer.held":               "where a holder's nodes are",
	"layer.ended":              "whose nodes are to be unlinked",
	"layer.due":                "made from the nodes",
	"meta.seq":                 "goes on",
	"meta.hash":                "goes on",
	"meta.boot":                "of this process",
	"meta.segment":             "of the segment itself",
	"meta.carrying":            "0 between segments",
	"meta.highwater":           "rises with each event; compared by itself",
	"node.firstChild":          "made from the parents",
	"node.nextSibling":         "made from the parents",
	"node.nextHeld":            "made from the holders",
	"storedCapability.decoded": "made from its JSON",
}

// byNode are maps of a layer whose keys are indexes of nodes.
var byNode = map[string]bool{"layer.used": true}

// dumper writes down all that a state says, without what is derived and without
// grants that are not carried.
type dumper struct {
	l       *layer
	carried map[int32]bool
	out     []string
	filled  map[string]bool // fields that had a value other than zero
}

func dump(l *layer) *dumper {
	d := &dumper{l: l, carried: map[int32]bool{}, filled: map[string]bool{}}
	for _, i := range l.inForce() {
		d.carried[i] = true
	}
	d.value("layer", reflect.ValueOf(l).Elem())
	slices.Sort(d.out)
	return d
}

func (d *dumper) say(path string, v any) { d.out = append(d.out, fmt.Sprintf("%s = %v", path, v)) }

func (d *dumper) value(path string, v reflect.Value) {
	switch v.Kind() {
	case reflect.Pointer:
		if v.IsNil() {
			d.say(path, "nil")
			return
		}
		d.value(path, v.Elem())
	case reflect.Struct:
		if v.Type() == reflect.TypeFor[nodeTable]() {
			for i := range d.l.len() {
				if d.carried[i] {
					n := d.l.get(i)
					d.value("grant "+n.id.String(), reflect.ValueOf(n).Elem())
				}
			}
			return
		}
		for i := range v.NumField() {
			name := v.Type().Name() + "." + v.Type().Field(i).Name
			if _, skip := derived[name]; skip {
				continue
			}
			if !v.Field(i).IsZero() {
				d.filled[name] = true
			}
			switch {
			case name == "node.parent":
				parent := "none"
				if p := int32(v.Field(i).Int()); p != none {
					parent = d.l.get(p).id.String()
				}
				d.say(path+"/parent", parent)
			case name == "layer.signed":
				for k := range d.l.signed {
					if d.carried[k.node] {
						d.say(path+"/signed", d.l.get(k.node).id.String()+" "+k.kid)
					}
				}
			case byNode[name]:
				for _, k := range v.Field(i).MapKeys() {
					if at := int32(k.Int()); d.carried[at] {
						d.value(path+"/"+name+" "+d.l.get(at).id.String(), v.Field(i).MapIndex(k))
					}
				}
			default:
				d.value(path+"/"+v.Type().Field(i).Name, v.Field(i))
			}
		}
	case reflect.Map:
		for _, k := range v.MapKeys() {
			if s := v.MapIndex(k); s.Kind() == reflect.String && s.String() == "" {
				continue // taken away
			}
			d.value(fmt.Sprintf("%s[%v]", path, k), v.MapIndex(k))
		}
	case reflect.Slice:
		if v.Type().Elem().Kind() == reflect.Uint8 {
			d.say(path, v.Bytes())
			return
		}
		for i := range v.Len() {
			d.value(fmt.Sprintf("%s[%d]", path, i), v.Index(i))
		}
	case reflect.Array, reflect.Bool, reflect.String, reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64,
		reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		d.say(path, v)
	default:
		panic("a state of kind " + v.Kind().String() + " at " + path + " is not looked at")
	}
}

// wanted are the fields of what the dumper went into, less what is derived.
func wanted() (names []string) {
	for _, t := range []reflect.Type{
		reflect.TypeFor[layer](), reflect.TypeFor[meta](), reflect.TypeFor[node](), reflect.TypeFor[about](), reflect.TypeFor[note](),
		reflect.TypeFor[usage](), reflect.TypeFor[vmInfo](), reflect.TypeFor[storedCapability](), reflect.TypeFor[actor](), reflect.TypeFor[signingKey](),
	} {
		for i := range t.NumField() {
			name := t.Name() + "." + t.Field(i).Name
			if _, skip := derived[name]; !skip {
				names = append(names, name)
			}
		}
	}
	return names
}

// everything puts into a ledger something of all that a state can say, and grants
// that have ended.
func everything(t testing.TB, l *Ledger, fake *clock.Fake) (open, gone []uuid.UUID) {
	t.Helper()
	// Whoever makes keys marks the ledger before.
	if err := l.Mark(); err != nil {
		t.Fatal(err)
	}
	uid := uint32(1000)
	person := Actor{Kind: ActorPerson, UID: &uid, PID: 47}
	vm2, run := uuid.New(), "run-1"
	two, nine := 2, 9
	end := func(d time.Duration) capabilities.Deadline { return capabilities.NewDeadline(fake.Now(), d) }
	root, child, grandchild, dead, heir, bare := uuid.New(), uuid.New(), uuid.New(), uuid.New(), uuid.New(), uuid.New()
	over, failed := uuid.New(), uuid.New()
	oldKey, newKey := ed25519.PublicKey(bytes.Repeat([]byte{1}, ed25519.PublicKeySize)), ed25519.PublicKey(bytes.Repeat([]byte{2}, ed25519.PublicKeySize))
	put(t, l,
		NewMark(someone, fake.Now()),
		Event{Type: VMBound, Actor: someone, VM: holder, Partition: partition, Data: JSON(BoundData{Alias: "mail"})},
		Event{Type: VMBound, Actor: someone, VM: vm2},
		Event{Type: VMStarted, Actor: someone, VM: holder, Data: JSON(RunData{Instance: run})},
		Event{Type: VMStarted, Actor: someone, VM: vm2, Data: JSON(RunData{Instance: "x"})},
		Event{Type: VMExited, Actor: someone, VM: vm2, Data: JSON(RunData{Instance: "x"})},
		Event{Type: NameSet, Actor: person, Partition: partition, Data: JSON(NameData{Name: "work"})},
		Event{Type: NameSet, Actor: person, Partition: vm2, Data: JSON(NameData{Name: "gone"})},
		Event{Type: NameRemoved, Actor: person, Partition: vm2, Data: JSON(NameData{Name: "gone"})},

		// Used, renewed, degraded, moved to another run, and being revoked.
		NewGrant(person, root, holder, partition, GrantRecord{
			Instance: run, Capability: capability(t, "/a"), Label: "a", Deadline: end(time.Hour), Persist: true,
			Limits: Limits{MaxDepth: &nine, MaxUses: &nine}, Decision: []byte(`{"verdict":{"outcome":"allow"}}`),
		}),
		NewChange(GrantActive, someone, root, Change{Reason: "seen", Instance: "run-2"}),
		renewal(root, end(90*time.Minute)),
		NewChange(GrantDegraded, someone, root, Change{Reason: "a guest held on"}),
		NewChange(GrantTroubled, someone, root, Change{Reason: "its directory is gone"}),
		NewGrant(Actor{Kind: ActorVM, VM: holder}, child, vm2, uuid.Nil, GrantRecord{
			Instance: run, Capability: capability(t, "/a/b"), Label: "b", Parent: root, Deadline: end(time.Minute), Declared: true, Limits: Limits{MaxDepth: &two, MaxUses: &nine},
		}),
		NewUse(someone, child, run),
		requested(grandchild, GrantRecord{Capability: capability(t, "/a/b"), Parent: child, Deadline: end(time.Second), Limits: Limits{MaxDepth: new(int), MaxUses: &two}}),
		NewChange(GrantRevoking, person, grandchild, Change{Reason: "asked to"}),

		// One key retired and revoked, after another took its place and signed for
		// grants that were made before it.
		NewKey(someone, oldKey),
		NewKey(someone, newKey),
		Event{Type: TokenIssued, Actor: person, Grant: root, Data: JSON(IssuedData{KID(newKey)})},
		Event{Type: KeyRevoked, Actor: person, Data: JSON(KeyRevokedData{KID(oldKey), "it was seen elsewhere"})},

		// Ended for good, while something that derives from it has not.
		requested(dead, GrantRecord{Capability: capability(t, "/c")}),
		requested(heir, GrantRecord{Capability: capability(t, "/c"), Parent: dead}),
		NewChange(GrantRevoking, person, dead, Change{Reason: "enough"}),
		NewChange(GrantRevoked, someone, dead, Change{}),

		requested(over, GrantRecord{Capability: capability(t, "/d"), Label: "over"}),
		NewChange(GrantActive, someone, over, Change{}),
		NewChange(GrantRevoking, someone, over, Change{}),
		NewChange(GrantRevoked, someone, over, Change{Reason: "seen to be gone"}),
		requested(failed, GrantRecord{Capability: capability(t, "/d")}),
		NewChange(GrantFailed, someone, failed, Change{Reason: "no slot"}),
		requested(bare, GrantRecord{Capability: capability(t, "/")}),
	)
	return []uuid.UUID{root, child, grandchild, dead, heir, bare}, []uuid.UUID{over, failed}
}

// TestRotationCarriesEverything compares the whole state before and after, by
// reflection, so that a field that is added and not carried fails it; and wants
// the comparison to have had something to compare of each field.
func TestRotationCarriesEverything(t *testing.T) {
	dir, fake := t.TempDir(), clock.NewFake()
	l := open(t, dir, fake)
	open, gone := everything(t, l, fake)
	before := dump(l.root)
	for _, name := range wanted() {
		if !before.filled[name] {
			t.Errorf("the test has no value for %s, and cannot tell whether it is carried; give it one in everything()", name)
		}
	}
	highwater := l.root.meta.highwater
	compare := func(when string) {
		t.Helper()
		after := dump(l.root)
		for _, line := range before.out {
			if !slices.Contains(after.out, line) {
				t.Errorf("%s: gone is %s", when, line)
			}
		}
		for _, line := range after.out {
			if !slices.Contains(before.out, line) {
				t.Errorf("%s: new is %s", when, line)
			}
		}
		if l.root.meta.highwater < highwater {
			t.Errorf("%s: the high-water mark fell", when)
		}
		l.View(func(s *State) {
			for _, id := range open {
				if _, ok := s.Grant(id); !ok {
					t.Errorf("%s: grant %s is gone", when, id)
				}
			}
			for _, id := range gone {
				if _, ok := s.Grant(id); ok {
					t.Errorf("%s: grant %s, which ended, is still there", when, id)
				}
			}
			if n := len(s.Grants(Filter{})); n != len(open) {
				t.Errorf("%s: there are %d grants", when, n)
			}
			if due := s.Due(capabilities.Instant{Wall: fake.Now().Wall.Add(2 * time.Hour)}, 0); len(due) != 2 {
				t.Errorf("%s: %d are due later, want the two that have a deadline and have not ended", when, len(due))
			}
			if sub := s.Subtree(open[0]); !slices.Equal(sub, open[1:3]) {
				t.Errorf("%s: from the first derives %v", when, sub)
			}
		})
	}
	rotated := func() {
		t.Helper()
		r, err := l.Rotate(t.Context(), someone)
		if err != nil {
			t.Fatal(err)
		}
		if r.Grants != len(open) || r.Bytes == 0 || r.Blocked <= 0 {
			t.Errorf("it says of itself %+v", r)
		}
	}
	rotated()
	compare("after a rotation")
	if err := l.Reopen(t.Context()); err != nil {
		t.Fatal(err)
	}
	compare("read again")
	put(t, l, Event{Type: BrokerStarted, Actor: someone})
	rotated()
	compare("after a second rotation")
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	var err error
	if l, err = Open(t.Context(), Options{Dir: dir, Kinds: testKinds, Clock: fake}); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	compare("after a restart")
}

// What the comparison says of itself: it finds a value that is not carried.
func TestDumpSeesEverything(t *testing.T) {
	fake := clock.NewFake()
	for name, spoil := range map[string]func(r *layer){
		"a use":      func(r *layer) { clear(r.used) },
		"a run":      func(r *layer) { clear(r.vms) },
		"an alias":   func(r *layer) { clear(r.aliases) },
		"a name":     func(r *layer) { clear(r.names) },
		"a reason":   func(r *layer) { r.mut(0).note = nil },
		"the epoch":  func(r *layer) { r.meta.epoch = 9 },
		"a limit":    func(r *layer) { a := *r.get(0).about; a.maxUses = -1; r.mut(0).about = &a },
		"a deadline": func(r *layer) { r.mut(0).boot++ },
		"a parent":   func(r *layer) { r.mut(1).parent = none },
	} {
		again, err := Open(context.Background(), Options{Dir: t.TempDir(), Kinds: testKinds, Clock: fake})
		if err != nil {
			t.Fatal(err)
		}
		everything(t, again, fake)
		if err := again.Close(); err != nil { // nobody else may look at what is spoilt
			t.Fatal(err)
		}
		before := dump(again.root).out
		spoil(again.root)
		if slices.Equal(before, dump(again.root).out) {
			t.Errorf("%s can be lost", name)
		}
	}
}
