package ledger

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/google/uuid"
	"pgregory.net/rapid"

	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/clock"
)

// TestMoves tries every event on a grant in every state and wants exactly the
// table.
func TestMoves(t *testing.T) {
	roads := map[GrantState][]EventType{
		Pending: nil, Active: {GrantActive}, Failed: {GrantFailed},
		Revoking: {GrantRevoking}, Revoked: {GrantRevoking, GrantRevoked},
	}
	l := open(t, t.TempDir(), clock.NewFake())
	for from, road := range roads {
		for _, event := range []EventType{GrantActive, GrantFailed, GrantRevoking, GrantRevoked} {
			id := uuid.New()
			put(t, l, requested(id, GrantRecord{Capability: capability(t, "/a")}))
			for _, e := range road {
				put(t, l, NewChange(e, someone, id, Change{}))
			}
			want, allowed := from, false
			for _, m := range Moves() {
				if m.From == from && m.Event == event {
					want, allowed = m.To, true
				}
			}
			err := try(l, NewChange(event, someone, id, Change{}))
			if allowed != (err == nil) || (!allowed && !errors.Is(err, ErrIllegalMove)) {
				t.Errorf("%s of a grant that is %s: %v, allowed is %v", event, from, err, allowed)
			}
			if got := stateOf(l, id); got != want {
				t.Errorf("%s of a grant that is %s: it is %s, want %s", event, from, got, want)
			}
		}
	}
	if err := try(l, NewChange(GrantActive, someone, uuid.New(), Change{})); !errors.Is(err, ErrIllegalMove) {
		t.Errorf("a move of no grant: %v", err)
	}
}

func TestDerivation(t *testing.T) {
	fake := clock.NewFake()
	l := open(t, t.TempDir(), fake)
	parent, child := uuid.New(), uuid.New()
	end := capabilities.NewDeadline(fake.Now(), time.Hour)
	put(t, l, requested(parent, GrantRecord{Capability: capability(t, "/a"), Deadline: end}))
	for name, c := range map[string]struct {
		r    GrantRecord
		want error
	}{
		"wider":             {GrantRecord{Capability: capability(t, "/"), Parent: parent, Deadline: end}, ErrNotCovered},
		"a sibling's":       {GrantRecord{Capability: capability(t, "/ab"), Parent: parent, Deadline: end}, ErrNotCovered},
		"longer":            {GrantRecord{Capability: capability(t, "/a"), Parent: parent, Deadline: capabilities.NewDeadline(fake.Now(), 2*time.Hour)}, ErrNotCovered},
		"endless":           {GrantRecord{Capability: capability(t, "/a"), Parent: parent}, ErrNotCovered},
		"an unknown parent": {GrantRecord{Capability: capability(t, "/a"), Parent: uuid.New()}, ErrIllegalMove},
	} {
		if err := try(l, requested(uuid.New(), c.r)); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	put(t, l, requested(child, GrantRecord{Capability: capability(t, "/a/b"), Parent: parent, Deadline: end}))
	if err := live(l, child, fake.Now()); err != nil {
		t.Errorf("a living child: %v", err)
	}
	put(t, l, NewChange(GrantRevoking, someone, parent, Change{}))
	err := live(l, child, fake.Now())
	dead, _ := errors.AsType[*DeadError](err)
	if !errors.Is(err, ErrRevoked) || dead == nil || dead.Cause != parent {
		t.Errorf("a child of a revoked parent: %v", err)
	}
	if err := try(l, requested(uuid.New(), GrantRecord{Capability: capability(t, "/a/b"), Parent: child, Deadline: end})); !errors.Is(err, ErrIllegalMove) {
		t.Errorf("a grandchild of a revoked grant: %v", err)
	}
}

// TestClockSetBack wants a lease that has ended to stay ended, whatever the
// clock says later, in this process and the next.
func TestClockSetBack(t *testing.T) {
	dir, fake, id := t.TempDir(), clock.NewFake(), uuid.New()
	func() {
		l, err := Open(context.Background(), Options{Dir: dir, Kinds: testKinds, Clock: fake})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		// Of another boot, so that only the wall clock counts.
		d := capabilities.NewDeadline(fake.Now(), time.Minute)
		d.BootID, d.Boot = uuid.NewString(), time.Hour
		put(t, l, requested(id, GrantRecord{Capability: capability(t, "/a"), Deadline: d}))
		start := fake.Now().Wall
		fake.Advance(time.Minute)
		if err := live(l, id, fake.Now()); !errors.Is(err, ErrExpired) {
			t.Errorf("at its deadline: %v", err)
		}
		put(t, l, Event{Type: ClockHighwater, Actor: someone, Data: JSON(HighwaterData{Wall: fake.Now().Wall})})
		fake.SetWall(start)
		if err := live(l, id, fake.Now()); !errors.Is(err, ErrExpired) {
			t.Errorf("after the clock was set back: %v", err)
		}
	}()
	l := open(t, dir, fake)
	if err := live(l, id, fake.Now()); !errors.Is(err, ErrExpired) {
		t.Errorf("after a restart: %v", err)
	}
	l.View(func(s *State) {
		if due := s.Due(fake.Now(), 0); len(due) != 1 || due[0] != id {
			t.Errorf("due: %v", due)
		}
	})
}

// TestTimeGoesOnBehindTheMark wants a lease to end although the wall clock was
// set far back while the machine was off.
func TestTimeGoesOnBehindTheMark(t *testing.T) {
	dir, fake, id := t.TempDir(), clock.NewFake(), uuid.New()
	l, err := Open(context.Background(), Options{Dir: dir, Kinds: testKinds, Clock: fake})
	if err != nil {
		t.Fatal(err)
	}
	put(t, l, requested(id, GrantRecord{Capability: capability(t, "/a"), Deadline: capabilities.NewDeadline(fake.Now(), time.Hour)}))
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	start := fake.Now().Wall
	fake.Reboot(uuid.NewString(), time.Minute)
	fake.SetWall(start.Add(-24 * time.Hour))
	l = open(t, dir, fake)
	fake.Advance(59 * time.Minute)
	if err := live(l, id, fake.Now()); err != nil {
		t.Errorf("within its hour: %v", err)
	}
	fake.Advance(time.Minute)
	if err := live(l, id, fake.Now()); !errors.Is(err, ErrExpired) {
		t.Errorf("after its hour: %v", err)
	}
}

func TestMaxDepth(t *testing.T) {
	l := open(t, t.TempDir(), clock.NewFake())
	limit := func(n int) Limits { return Limits{MaxDepth: &n} }
	derive := func(parent uuid.UUID, limits Limits) (uuid.UUID, error) {
		id := uuid.New()
		return id, try(l, requested(id, GrantRecord{Capability: capability(t, "/a"), Parent: parent, Limits: limits}))
	}
	top, err := derive(uuid.Nil, limit(1))
	if err != nil {
		t.Fatal(err)
	}
	for name, limits := range map[string]Limits{"no limit": {}, "the same": limit(1), "more": limit(2)} {
		if _, err := derive(top, limits); !errors.Is(err, ErrNotCovered) {
			t.Errorf("a child with %s: %v", name, err)
		}
	}
	child, err := derive(top, limit(0))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := derive(child, limit(0)); !errors.Is(err, ErrNotCovered) {
		t.Errorf("a grandchild: %v", err)
	}
}

var errGivenUp = errors.New("given up")

// model is what the ledger should know, in its simplest form.
type model struct {
	state  map[uuid.UUID]GrantState
	parent map[uuid.UUID]uuid.UUID
	holder map[uuid.UUID]uuid.UUID
	order  []uuid.UUID
	names  map[uuid.UUID]string
}

// open are the grants of a holder, or of everybody, that are not final.
func (m *model) open(holder uuid.UUID) []uuid.UUID {
	return slices.DeleteFunc(slices.Clone(m.order), func(id uuid.UUID) bool {
		return m.state[id].Final() || holder != uuid.Nil && m.holder[id] != holder
	})
}

func (m *model) alive(id uuid.UUID) bool {
	for ; id != uuid.Nil; id = m.parent[id] {
		if m.state[id].Ended() {
			return false
		}
	}
	return true
}

func TestFoldAgainstModel(t *testing.T) {
	root := t.TempDir()
	n := 0
	rapid.Check(t, func(t *rapid.T) {
		n++
		dir := fmt.Sprintf("%s/%d", root, n)
		fake := clock.NewFake()
		o := Options{Dir: dir, Kinds: testKinds, Clock: fake}
		l, err := Open(context.Background(), o)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = l.Close() }()
		c, err := testKinds.Parse("fs:ro:"+partition.String()+":/a", nil)
		if err != nil {
			t.Fatal(err)
		}
		m := &model{map[uuid.UUID]GrantState{}, map[uuid.UUID]uuid.UUID{}, map[uuid.UUID]uuid.UUID{}, nil, map[uuid.UUID]string{}}
		holders := []uuid.UUID{holder, uuid.MustParse("bbbbbbbb-bbbb-4bbb-8bbb-bbbbbbbbbbbb")}
		// opened compares what is open with the model, as any state sees it.
		opened := func(s *State) {
			for _, h := range append(holders, uuid.Nil) {
				var got []uuid.UUID
				for _, g := range s.Grants(Filter{Holder: h, States: []GrantState{Pending, Active, Revoking}}) {
					got = append(got, g.ID)
				}
				if want := m.open(h); !slices.Equal(got, want) {
					t.Fatalf("open of %s: %v, want %v", h, got, want)
				}
				if n := s.Count(Filter{Holder: h}); n != len(got) {
					t.Fatalf("%d open of %s are counted, want %d", n, h, len(got))
				}
				var held []uuid.UUID
				for g := range s.Held(h) {
					held = append(held, g.ID)
				}
				if h != uuid.Nil && (len(held) != len(got) || slices.Contains(s.Holders(), h) != (len(got) > 0)) {
					t.Fatalf("%s holds %v, want %v; those who hold something are %v", h, held, got, s.Holders())
				}
			}
		}
		check := func() {
			l.View(func(s *State) {
				opened(s)
				for h := range s.l.held {
					for i := s.l.newestHeld(h); i != none; i = s.l.get(i).nextHeld {
						if st := s.l.get(i).stateName(); st.Final() {
							t.Fatalf("the list of what %s has open still holds one that is %s", h, st)
						}
					}
				}
				var got []uuid.UUID
				for _, g := range s.Grants(Filter{}) {
					got = append(got, g.ID)
					if g.State != m.state[g.ID] || g.Parent != m.parent[g.ID] {
						t.Fatalf("grant %s is %s of %s, want %s of %s", g.ID, g.State, g.Parent, m.state[g.ID], m.parent[g.ID])
					}
					if (s.Live(g.ID, fake.Now()) == nil) != m.alive(g.ID) {
						t.Fatalf("grant %s: alive is %v in the model", g.ID, m.alive(g.ID))
					}
				}
				if !slices.Equal(got, m.order) || !maps.Equal(s.Names(), m.names) {
					t.Fatalf("grants %v and names %v, want %v and %v", got, s.Names(), m.order, m.names)
				}
			})
		}
		for range rapid.IntRange(1, 25).Draw(t, "steps") {
			pick := func() uuid.UUID {
				if len(m.order) == 0 {
					return uuid.Nil
				}
				return rapid.SampledFrom(m.order).Draw(t, "grant")
			}
			switch rapid.IntRange(0, 6).Draw(t, "step") {
			case 0, 1:
				id, parent := uuid.New(), uuid.Nil
				if rapid.Bool().Draw(t, "derived") {
					parent = pick()
				}
				h := rapid.SampledFrom(holders).Draw(t, "holder")
				err := try(l, NewGrant(someone, id, h, partition, GrantRecord{Capability: c, Parent: parent}))
				if (err == nil) != (parent == uuid.Nil || m.alive(parent)) {
					t.Fatalf("derived from %s: %v", parent, err)
				}
				if err == nil {
					m.state[id], m.parent[id], m.holder[id] = Pending, parent, h
					m.order = append(m.order, id)
				}
			case 2:
				id := pick()
				event := rapid.SampledFrom([]EventType{GrantActive, GrantFailed, GrantRevoking, GrantRevoked}).Draw(t, "event")
				move, illegal := move(m.state[id], event)
				if event == GrantActive && !m.alive(id) {
					illegal = ErrIllegalMove // an ancestor ended, which is not on record of it
				}
				err := try(l, NewChange(event, someone, id, Change{Reason: "r"}))
				if id != uuid.Nil && (err == nil) != (illegal == nil) {
					t.Fatalf("%s of %s: %v, %v", event, m.state[id], err, illegal)
				}
				if err == nil {
					m.state[id] = move.To
				}
			case 3:
				p := uuid.New()
				if err := try(l, Event{Type: NameSet, Actor: someone, Partition: p, Data: JSON(NameData{Name: "n" + p.String()})}); err != nil {
					t.Fatal(err)
				}
				m.names[p] = "n" + p.String()
			case 4:
				if err := l.Close(); err != nil {
					t.Fatal(err)
				}
				if l, err = Open(context.Background(), o); err != nil {
					t.Fatal(err)
				}
			case 5, 6:
				// Two moves in one update, seen half way; what is given up again
				// leaves nothing.
				id, h, keep := uuid.New(), rapid.SampledFrom(holders).Draw(t, "holder"), rapid.Bool().Draw(t, "keep")
				before := *m
				before.order = slices.Clone(m.order)
				_, err := l.Update(context.Background(), func(tx *Tx) error {
					if err := tx.Append(NewGrant(someone, id, h, partition, GrantRecord{Capability: c})); err != nil {
						return err
					}
					m.state[id], m.holder[id] = Pending, h
					m.order = append(m.order, id)
					opened(tx.State())
					if err := tx.Append(NewChange(GrantFailed, someone, id, Change{Reason: "r"})); err != nil {
						return err
					}
					m.state[id] = Failed
					opened(tx.State())
					if !keep {
						return errGivenUp
					}
					return nil
				})
				if keep != (err == nil) {
					t.Fatal(err)
				}
				if !keep {
					m.order = before.order
				}
			}
			check()
		}
	})
}
