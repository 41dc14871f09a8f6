package ledger

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"pgregory.net/rapid"

	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/clock"
)

func count(n int) *int { return &n }

// usesOf is what was charged to a grant.
func usesOf(l *Ledger, id uuid.UUID) (n int) {
	l.View(func(s *State) {
		g, _ := s.Grant(id)
		n = g.Uses
	})
	return n
}

// tried is all that a random sequence did, so that a property that holds since
// nothing was done is noticed.
type tried struct{ derived, refused, used, overdrawn, ended, dead int }

// Whatever is delegated, attenuated, used, revoked and left to expire: what is
// live is covered by every ancestor in resource, rights, lifetime, depth and
// uses, and no budget is ever exceeded. Before and after a restart.
func TestNothingIsEverAmplified(t *testing.T) {
	root := t.TempDir()
	n := 0
	var all tried
	rapid.Check(t, func(t *rapid.T) {
		n++
		fake := clock.NewFake()
		o := Options{Dir: fmt.Sprintf("%s/%d", root, n), Kinds: testKinds, Clock: fake}
		l, err := Open(context.Background(), o)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = l.Close() }()
		var ids []uuid.UUID
		parents := map[uuid.UUID]uuid.UUID{}
		budget, spent := map[uuid.UUID]int{}, map[uuid.UUID]int{} // the model of uses
		ended := map[uuid.UUID]bool{}
		lineage := func(id uuid.UUID) (out []uuid.UUID) {
			for ; id != uuid.Nil; id = parents[id] {
				out = append(out, id)
			}
			return out
		}
		limit := func(name string) *int {
			if v := rapid.IntRange(-1, 4).Draw(t, name); v >= 0 {
				return &v
			}
			return nil
		}
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			pick := func() uuid.UUID {
				if len(ids) == 0 {
					return uuid.Nil
				}
				return rapid.SampledFrom(ids).Draw(t, "grant")
			}
			switch rapid.IntRange(0, 9).Draw(t, "step") {
			case 0, 1, 2, 3:
				spelling := "fs:" + rapid.SampledFrom([]string{"ro", "rw"}).Draw(t, "mode") + ":" + partition.String() + ":" +
					rapid.SampledFrom([]string{"/", "/a", "/a/b", "/c"}).Draw(t, "path")
				c, err := testKinds.Parse(spelling, nil)
				if err != nil {
					t.Fatal(err)
				}
				r := GrantRecord{Capability: c, Limits: Limits{MaxDepth: limit("depth"), MaxUses: limit("uses")}}
				if s := rapid.IntRange(0, 4).Draw(t, "ttl"); s > 0 {
					r.Deadline = capabilities.NewDeadline(fake.Now(), time.Duration(s)*10*time.Second)
				}
				if len(ids) > 0 && rapid.IntRange(0, 5).Draw(t, "derive") > 0 {
					r.Parent = pick()
				}
				id := uuid.New()
				err = try(l, NewGrant(someone, id, uuid.New(), partition, r))
				switch {
				case err == nil:
					ids = append(ids, id)
					parents[id] = r.Parent
					if r.Limits.MaxUses != nil {
						budget[id] = *r.Limits.MaxUses
					}
					if r.Parent != uuid.Nil {
						all.derived++
					}
				case errors.Is(err, ErrNotCovered) || errors.Is(err, ErrIllegalMove):
					all.refused++
				default:
					t.Fatal(err)
				}
			case 4, 5, 6:
				id := pick()
				if id == uuid.Nil {
					continue
				}
				run := rapid.SampledFrom([]string{"1", "2", uuid.NewString()}).Draw(t, "run")
				var again bool
				l.View(func(s *State) { again = s.Charged(id, run) })
				err := try(l, NewUse(someone, id, run))
				if again && err == nil {
					t.Fatalf("run %s was charged twice", run)
				}
				if err == nil {
					all.used++
					for _, a := range lineage(id) {
						spent[a]++
					}
				} else if errors.Is(err, ErrUsedUp) {
					all.overdrawn++
				}
			case 7:
				if id := pick(); id != uuid.Nil && try(l, NewChange(GrantRevoking, someone, id, Change{})) == nil {
					all.ended++
					ended[id] = true
				}
			case 8:
				fake.Advance(time.Duration(rapid.IntRange(1, 15).Draw(t, "seconds")) * time.Second)
			case 9:
				if err := l.Close(); err != nil {
					t.Fatal(err)
				}
				if l, err = Open(context.Background(), o); err != nil {
					t.Fatal(err)
				}
			}
			now := fake.Now()
			l.View(func(s *State) {
				for _, id := range ids {
					g, _ := s.Grant(id)
					if most, counted := budget[id]; g.Uses != spent[id] || counted && spent[id] > most {
						t.Fatalf("grant %s: %d uses of %d are on record, %d were made", id, g.Uses, most, spent[id])
					}
					live := s.Live(id, now) == nil
					if !live {
						all.dead++
					}
					for _, a := range lineage(id)[1:] {
						up, _ := s.Grant(a)
						if live && (ended[a] || s.Live(a, now) != nil) {
							t.Fatalf("grant %s lives and its ancestor %s does not", id, a)
						}
						if !live {
							continue
						}
						if !testKinds.Covers(up.Capability, g.Capability) {
							t.Fatalf("%s derives from %s", g.Capability, up.Capability)
						}
						if !up.Deadline.IsZero() && (g.Deadline.IsZero() || g.Deadline.Remaining(now) > up.Deadline.Remaining(now)) {
							t.Fatalf("grant %s outlives its ancestor %s", id, a)
						}
						if d := up.Limits.MaxDepth; d != nil && (g.Depth-up.Depth > *d || g.Limits.MaxDepth == nil || *g.Limits.MaxDepth > *d-(g.Depth-up.Depth)) {
							t.Fatalf("grant %s is %d below %s, whose max_depth is %d", id, g.Depth-up.Depth, a, *d)
						}
						if u := up.Limits.MaxUses; u != nil && (g.Limits.MaxUses == nil || *g.Limits.MaxUses > *u) {
							t.Fatalf("grant %s has more uses than its ancestor %s", id, a)
						}
					}
				}
			})
		}
	})
	if all.derived == 0 || all.refused == 0 || all.used == 0 || all.overdrawn == 0 || all.ended == 0 || all.dead == 0 {
		t.Errorf("not all was tried: %+v", all)
	}
}

func TestUsesAreChargedToEveryAncestor(t *testing.T) {
	l := open(t, t.TempDir(), clock.NewFake())
	root, left, right, leaf := uuid.New(), uuid.New(), uuid.New(), uuid.New()
	c := capability(t, "/a")
	record := func(parent uuid.UUID, uses int) GrantRecord {
		return GrantRecord{Capability: c, Parent: parent, Limits: Limits{MaxUses: count(uses)}}
	}
	put(t, l, requested(root, record(uuid.Nil, 5)), requested(left, record(root, 5)), requested(right, record(root, 5)), requested(leaf, record(left, 2)))
	for name, c := range map[string]struct {
		r    GrantRecord
		want error
	}{
		"more than its parent": {record(root, 6), ErrNotCovered},
		"no limit beneath one": {GrantRecord{Capability: c, Parent: root}, ErrNotCovered},
	} {
		if err := try(l, requested(uuid.New(), c.r)); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	put(t, l, NewUse(someone, leaf, "1"), NewUse(someone, leaf, "2"), NewUse(someone, right, "1"), NewUse(someone, root, "1"))
	var dead *DeadError
	if err := try(l, NewUse(someone, leaf, "3")); !errors.Is(err, ErrUsedUp) || !errors.As(err, &dead) || dead.Cause != leaf {
		t.Errorf("its own budget: %v", err)
	}
	put(t, l, NewUse(someone, left, "1"))
	// A budget of five delegated twice is still five.
	for _, id := range []uuid.UUID{root, left, right} {
		if err := try(l, NewUse(someone, id, "9")); !errors.Is(err, ErrUsedUp) || !errors.As(err, &dead) || dead.Cause != root {
			t.Errorf("the root's budget: %v", err)
		}
	}
	for id, want := range map[uuid.UUID]int{root: 5, left: 3, right: 1, leaf: 2} {
		if got := usesOf(l, id); got != want {
			t.Errorf("%d uses of a grant that was used %d times", got, want)
		}
	}
	// What its last use gave goes on; nothing more comes of it.
	if err := live(l, right, clock.NewFake().Now()); err != nil {
		t.Errorf("a used-up grant: %v", err)
	}
	if err := try(l, requested(uuid.New(), record(right, 1))); !errors.Is(err, ErrUsedUp) {
		t.Errorf("derived from what is used up: %v", err)
	}
}

func TestUsesThatAreRefused(t *testing.T) {
	l := open(t, t.TempDir(), clock.NewFake())
	root, child, free := uuid.New(), uuid.New(), uuid.New()
	c := capability(t, "/a")
	put(t, l, requested(root, GrantRecord{Capability: c}), requested(child, GrantRecord{Capability: c, Parent: root}), requested(free, GrantRecord{Capability: c}))
	put(t, l, NewUse(someone, child, "1"), NewChange(GrantRevoking, someone, root, Change{}))
	for name, c := range map[string]struct {
		e    Event
		want error
	}{
		"for the same run again":         {NewUse(someone, child, "1"), ErrIllegalMove},
		"of what an ancestor took along": {NewUse(someone, child, "2"), ErrIllegalMove},
		"of what ended":                  {NewUse(someone, root, "1"), ErrIllegalMove},
		"of nothing":                     {NewUse(someone, uuid.New(), "1"), ErrIllegalMove},
		"for no run":                     {NewUse(someone, free, ""), ErrInvalidEvent},
		"with data of another shape":     {Event{Type: GrantUsed, Actor: someone, Grant: free, Data: []byte(`{"instance":1}`)}, ErrInvalidEvent},
	} {
		if err := try(l, c.e); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	if got := usesOf(l, child); got != 1 {
		t.Errorf("%d uses", got)
	}
	// What died with its ancestor does not become active, though its own end is
	// not on record.
	if err := try(l, NewChange(GrantActive, someone, child, Change{})); !errors.Is(err, ErrRevoked) {
		t.Errorf("active after its ancestor's end: %v", err)
	}
}

// A budget holds among many that use it at once.
func TestBudgetUnderManyAtOnce(t *testing.T) {
	l := open(t, t.TempDir(), clock.NewFake())
	root := uuid.New()
	c := capability(t, "/a")
	limits := Limits{MaxUses: count(5)}
	put(t, l, requested(root, GrantRecord{Capability: c, Limits: limits}))
	var wg sync.WaitGroup
	var mu sync.Mutex
	got := map[bool]int{}
	for range 100 {
		wg.Go(func() {
			id := uuid.New()
			if err := try(l, requested(id, GrantRecord{Capability: c, Parent: root, Limits: limits})); err != nil && !errors.Is(err, ErrUsedUp) {
				t.Error(err)
				return
			}
			err := try(l, NewUse(someone, id, "1"))
			if err != nil && !errors.Is(err, ErrIllegalMove) {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			got[err == nil]++
		})
	}
	wg.Wait()
	if got[true] != 5 || got[false] != 95 || usesOf(l, root) != 5 {
		t.Errorf("%d of 100 had a use of a budget of 5, %d are on record", got[true], usesOf(l, root))
	}
}
