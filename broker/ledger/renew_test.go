package ledger

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"testing"
	"time"

	"github.com/google/uuid"
	"pgregory.net/rapid"

	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/clock"
)

func renewal(id uuid.UUID, d capabilities.Deadline) Event {
	return NewRenewal(someone, id, RenewData{Deadline: d, Decision: []byte(`{"outcome":"allow"}`)})
}

func dueNow(l *Ledger, now capabilities.Instant) (due []uuid.UUID, next time.Duration, some bool) {
	l.View(func(s *State) {
		due = s.Due(now, 0)
		next, some = s.NextDeadline(now)
	})
	return due, next, some
}

// TestRenewal wants what a renewal says to be what ends the lease, in this
// process and the next, and the deadline before it to be forgotten.
func TestRenewal(t *testing.T) {
	dir, fake, id, child := t.TempDir(), clock.NewFake(), uuid.New(), uuid.New()
	l, err := Open(context.Background(), Options{Dir: dir, Kinds: testKinds, Clock: fake})
	if err != nil {
		t.Fatal(err)
	}
	put(t, l, requested(id, GrantRecord{Capability: capability(t, "/a"), Deadline: capabilities.NewDeadline(fake.Now(), time.Minute)}),
		requested(child, GrantRecord{Capability: capability(t, "/a/b"), Parent: id, Deadline: capabilities.NewDeadline(fake.Now(), time.Minute)}))
	fake.Advance(50 * time.Second)
	renewed := fake.Now()
	until := capabilities.NewDeadline(renewed, time.Minute)
	put(t, l, renewal(id, until))
	look := func(when string, wantDue []uuid.UUID, wantNext time.Duration) {
		t.Helper()
		if due, next, some := dueNow(l, fake.Now()); !slices.Equal(due, wantDue) || !some || next != wantNext {
			t.Errorf("%s: due %v, next in %v (%v); want %v and %v", when, due, next, some, wantDue, wantNext)
		}
	}
	look("when it was renewed", nil, 10*time.Second)
	fake.Advance(10 * time.Second)
	look("at the first deadline", []uuid.UUID{child}, 0)
	if err := live(l, id, fake.Now()); err != nil {
		t.Errorf("a renewed lease at its first deadline: %v", err)
	}
	if err := live(l, child, fake.Now()); !errors.Is(err, ErrExpired) {
		t.Errorf("what derives from a renewed lease, at its own deadline: %v", err)
	}
	put(t, l, NewChange(GrantRevoking, someone, child, Change{}))
	look("after its child ended", nil, 50*time.Second)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l = open(t, dir, fake)
	look("in another process", nil, 50*time.Second)
	l.View(func(s *State) {
		if g, _ := s.Grant(id); g.Deadline != until || g.Generation != 2 || !g.Renewed.Equal(renewed.Wall) {
			t.Errorf("in another process it ends at %v, in generation %d, renewed at %v", g.Deadline, g.Generation, g.Renewed)
		}
	})
	fake.Advance(50 * time.Second)
	look("at the second deadline", []uuid.UUID{id}, 0)
	if err := live(l, id, fake.Now()); !errors.Is(err, ErrExpired) {
		t.Errorf("a renewed lease at its second deadline: %v", err)
	}
}

func TestRenewalsThatAreRefused(t *testing.T) {
	fake := clock.NewFake()
	l := open(t, t.TempDir(), fake)
	c := capability(t, "/a")
	minute := capabilities.NewDeadline(fake.Now(), time.Minute)
	parent, child, endless, ended, expired := uuid.New(), uuid.New(), uuid.New(), uuid.New(), uuid.New()
	put(t, l,
		requested(parent, GrantRecord{Capability: c, Deadline: capabilities.NewDeadline(fake.Now(), 10*time.Minute)}),
		requested(child, GrantRecord{Capability: c, Parent: parent, Deadline: minute}),
		requested(endless, GrantRecord{Capability: c}),
		requested(ended, GrantRecord{Capability: c, Deadline: minute}),
		NewChange(GrantRevoking, someone, ended, Change{}),
		requested(expired, GrantRecord{Capability: c, Deadline: capabilities.NewDeadline(fake.Now(), time.Second)}),
	)
	fake.Advance(time.Second)
	in := func(d time.Duration) capabilities.Deadline { return capabilities.NewDeadline(fake.Now(), d) }
	otherBoot, noBoot, negative := in(5*time.Minute), in(5*time.Minute), in(5*time.Minute)
	otherBoot.BootID, noBoot.BootID, negative.Boot = uuid.NewString(), "", -1
	for name, tc := range map[string]struct {
		id   uuid.UUID
		d    capabilities.Deadline
		want error
	}{
		"later than its parent's":    {child, in(10 * time.Minute), ErrNotCovered},
		"sooner than before":         {child, in(58 * time.Second), ErrInvalidEvent},
		"without an end":             {child, capabilities.Deadline{}, ErrInvalidEvent},
		"in another boot":            {child, otherBoot, ErrInvalidEvent},
		"on one clock":               {child, noBoot, ErrInvalidEvent},
		"before the boot":            {child, negative, ErrInvalidEvent},
		"of what has no end":         {endless, in(time.Hour), ErrIllegalMove},
		"of what was revoked":        {ended, in(time.Hour), ErrIllegalMove},
		"of what expired, unnoticed": {expired, in(time.Hour), ErrIllegalMove},
		"of nobody":                  {uuid.New(), in(time.Hour), ErrIllegalMove},
	} {
		if err := try(l, renewal(tc.id, tc.d)); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", name, err, tc.want)
		}
	}
	put(t, l, renewal(child, in(9*time.Minute)))
	put(t, l, NewChange(GrantRevoking, someone, parent, Change{}))
	if err := try(l, renewal(child, in(9*time.Minute))); !errors.Is(err, ErrIllegalMove) {
		t.Errorf("under a parent that was revoked: %v", err)
	}
}

// lease is what the naive model knows of one.
type lease struct {
	id, parent, holder uuid.UUID
	deadline           capabilities.Deadline
	ended              bool
}

// TestLeasesAgainstModel compares what is due, whose it is, and when the next
// one will be, with a walk over all leases, through renewals, set clocks,
// restarts and reboots, in committed states and in the midst of an update.
func TestLeasesAgainstModel(t *testing.T) {
	root := t.TempDir()
	n := 0
	rapid.Check(t, func(t *rapid.T) {
		n++
		fake := clock.NewFake()
		o := Options{Dir: fmt.Sprintf("%s/%d", root, n), Kinds: testKinds, Clock: fake}
		l, err := Open(context.Background(), o)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = l.Close() }()
		c, err := testKinds.Parse("fs:ro:"+partition.String()+":/a", nil)
		if err != nil {
			t.Fatal(err)
		}
		holders := []uuid.UUID{holder, uuid.MustParse("bbbbbbbb-bbbb-4bbb-8bbb-bbbbbbbbbbbb")}
		all := map[uuid.UUID]*lease{}
		var order []uuid.UUID
		check := func(s *State) {
			now := s.Effective(fake.Now())
			var due []uuid.UUID
			whose, next := map[uuid.UUID]bool{}, time.Duration(math.MaxInt64)
			for _, g := range all {
				if g.ended || g.deadline.IsZero() {
					continue
				}
				next = min(next, g.deadline.Remaining(now))
				if g.deadline.Passed(now) {
					due = append(due, g.id)
					whose[g.holder] = true
				}
			}
			byText := func(a, b uuid.UUID) int { return slices.Compare(a[:], b[:]) }
			got := s.Due(fake.Now(), 0)
			slices.SortFunc(got, byText)
			slices.SortFunc(due, byText)
			if !slices.Equal(got, due) {
				t.Fatalf("due are %v, want %v", got, due)
			}
			if some := s.Due(fake.Now(), 2); len(some) != min(2, len(due)) {
				t.Fatalf("of %d at most 2 that are due: %v", len(due), some)
			}
			holding := s.DueHolders(fake.Now())
			if len(holding) != len(whose) {
				t.Fatalf("due are those of %v, want %v", holding, whose)
			}
			for h := range whose {
				if _, ok := holding[h]; !ok {
					t.Fatalf("due are those of %v, want %v", holding, whose)
				}
			}
			if d, ok := s.NextDeadline(fake.Now()); ok != (next != math.MaxInt64) || ok && d != next {
				t.Fatalf("the next one is in %v (%v), want %v", d, ok, next)
			}
		}
		// some updates are given up after they were looked at.
		var undo []func()
		commit := func(e Event, legal bool, done func()) {
			keep := rapid.Bool().Draw(t, "keep")
			_, err := l.Update(context.Background(), func(tx *Tx) error {
				err := tx.Append(e)
				if (err == nil) != legal {
					t.Fatalf("%s: %v, legal is %v", e.Type, err, legal)
				}
				if err != nil {
					return err
				}
				done()
				check(tx.State())
				if !keep {
					return errGivenUp
				}
				return nil
			})
			if err != nil && legal && keep {
				t.Fatal(err)
			}
			if err != nil {
				for _, f := range undo {
					f()
				}
			}
			undo = nil
		}
		alive := func(g *lease, now capabilities.Instant) bool {
			for ; g != nil; g = all[g.parent] {
				if g.ended || g.deadline.Passed(now) {
					return false
				}
			}
			return true
		}
		now := func() (now capabilities.Instant) {
			l.View(func(s *State) { now = s.Effective(fake.Now()) })
			return now
		}
		ttl := func() time.Duration { return time.Duration(rapid.IntRange(1, 40).Draw(t, "ttl")) * time.Second }
		pick := func() *lease {
			if len(order) == 0 {
				return nil
			}
			return all[rapid.SampledFrom(order).Draw(t, "grant")]
		}
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			switch rapid.IntRange(0, 9).Draw(t, "step") {
			case 0, 1:
				now := now()
				g := &lease{id: uuid.New(), holder: rapid.SampledFrom(holders).Draw(t, "holder")}
				if rapid.IntRange(0, 9).Draw(t, "lease") > 0 {
					g.deadline = capabilities.NewDeadline(now, ttl())
				}
				if p := pick(); p != nil && rapid.Bool().Draw(t, "derived") {
					if !alive(p, now) {
						continue
					}
					g.parent, g.deadline = p.id, capabilities.Earliest(now, g.deadline, p.deadline)
					if g.deadline.Wall.After(p.deadline.Wall) && !p.deadline.IsZero() {
						continue // the parent's clocks differ, which is another test's
					}
				}
				undo = append(undo, func() {
					delete(all, g.id)
					order = slices.DeleteFunc(order, func(id uuid.UUID) bool { return id == g.id })
				})
				commit(NewGrant(someone, g.id, g.holder, partition, GrantRecord{Capability: c, Parent: g.parent, Deadline: g.deadline}), true,
					func() { all[g.id], order = g, append(order, g.id) })
			case 2, 3, 4:
				g := pick()
				if g == nil {
					continue
				}
				now := now()
				old, d := g.deadline, capabilities.NewDeadline(now, ttl())
				legal := alive(g, now) && !old.IsZero() && d.Remaining(now) >= old.Remaining(now) && !d.Wall.Before(old.Wall)
				if p := all[g.parent]; p != nil && outlives(d, p.deadline, now) {
					legal = false
				}
				undo = append(undo, func() { g.deadline = old })
				commit(renewal(g.id, d), legal, func() { g.deadline = d })
			case 5:
				g := pick()
				if g == nil {
					continue
				}
				was := g.ended
				undo = append(undo, func() { g.ended = was })
				commit(NewChange(GrantRevoking, someone, g.id, Change{}), !was, func() { g.ended = true })
			case 6, 7:
				fake.Advance(time.Duration(rapid.IntRange(1, 15).Draw(t, "advance")) * time.Second)
			case 8:
				fake.SetWall(fake.Now().Wall.Add(time.Duration(rapid.IntRange(-60, 60).Draw(t, "set")) * time.Second))
			case 9:
				if err := l.Close(); err != nil {
					t.Fatal(err)
				}
				if rapid.Bool().Draw(t, "reboot") {
					fake.Reboot(uuid.NewString(), time.Duration(rapid.IntRange(0, 5).Draw(t, "off"))*time.Second)
				}
				if l, err = Open(context.Background(), o); err != nil {
					t.Fatal(err)
				}
			}
			l.View(check)
		}
	})
}

// TestRenewalsAreBounded wants a lease that is renewed again and again to cost
// no more than one.
func TestRenewalsAreBounded(t *testing.T) {
	fake := clock.NewFake()
	l := open(t, t.TempDir(), fake)
	id := uuid.New()
	put(t, l, requested(id, GrantRecord{Capability: capability(t, "/a"), Deadline: capabilities.NewDeadline(fake.Now(), time.Hour)}))
	for range 40 {
		var more []Event
		for i := range 200 {
			more = append(more, renewal(id, capabilities.NewDeadline(fake.Now(), time.Hour+time.Duration(i)*time.Nanosecond)))
		}
		put(t, l, more...)
		fake.Advance(time.Second)
	}
	// One Update is one new deadline.
	for range 1200 {
		fake.Advance(time.Millisecond)
		put(t, l, renewal(id, capabilities.NewDeadline(fake.Now(), time.Hour)))
	}
	l.mu.RLock()
	defer l.mu.RUnlock()
	if wall, boot := len(l.root.due.wall), len(l.root.due.boot); wall > 600 || boot > 600 || wall == 0 || boot == 0 {
		t.Errorf("one lease that was renewed 1240 times takes %d and %d places", wall, boot)
	}
}
