package ledger

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/clock"
)

// TestTimeWithoutABroker has a lease outlive a reboot, with the wall clock set
// back, and its deadline pass while no broker runs: boot time tells the next one.
func TestTimeWithoutABroker(t *testing.T) {
	dir, fake, id := t.TempDir(), clock.NewFake(), uuid.New()
	start := func() *Ledger {
		t.Helper()
		l, err := Open(context.Background(), Options{Dir: dir, Kinds: testKinds, Clock: fake})
		if err != nil {
			t.Fatal(err)
		}
		_, err = l.Update(context.Background(), func(tx *Tx) error { return tx.Append(NewMark(someone, tx.Now())) })
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	l := start()
	put(t, l, requested(id, GrantRecord{Capability: capability(t, "/a"), Deadline: capabilities.NewDeadline(fake.Now(), time.Hour)}))
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	fake.Reboot(uuid.NewString(), 0)
	fake.SetWall(fake.Now().Wall.Add(-24 * time.Hour))
	for _, step := range []struct {
		down time.Duration
		live bool
	}{{0, true}, {30 * time.Minute, true}, {30*time.Minute - 1, true}, {1, false}} {
		fake.Advance(step.down)
		l = start()
		err := live(l, id, fake.Now())
		if step.live && err != nil || !step.live && !errors.Is(err, ErrExpired) {
			t.Errorf("after another %v without a broker: %v, want it to be live: %v", step.down, err, step.live)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestInThisBoot wants a deadline of an earlier boot to be told on this boot's
// clock, the same at every look, and one of this boot as it is.
func TestInThisBoot(t *testing.T) {
	fake := clock.NewFake()
	l := open(t, t.TempDir(), fake)
	old := capabilities.NewDeadline(fake.Now(), time.Hour)
	in := func(d capabilities.Deadline) (out capabilities.Deadline) {
		l.View(func(s *State) { out = s.InThisBoot(d) })
		return out
	}
	old.BootID, old.Boot = uuid.NewString(), 7*time.Hour
	if got := in(old); got != old {
		t.Errorf("without a mark: %v", got)
	}
	put(t, l, NewMark(someone, fake.Now()))
	want := old
	want.BootID, want.Boot = fake.Now().BootID, fake.Now().Boot+time.Hour
	for range 3 {
		if got := in(old); got != want {
			t.Errorf("%v, want %v", got, want)
		}
		fake.SetWall(fake.Now().Wall.Add(-time.Hour))
		fake.Advance(10 * time.Minute)
		put(t, l, NewMark(someone, fake.Now()))
	}
	own := capabilities.NewDeadline(fake.Now(), time.Minute)
	if got := in(own); got != own {
		t.Errorf("%v, want %v", got, own)
	}
	if got := in(capabilities.Deadline{}); !got.IsZero() {
		t.Errorf("no deadline became %v", got)
	}
	over := old
	over.Wall = over.Wall.Add(-2 * time.Hour * 24)
	if got := in(over); got.Boot != 0 || !got.Passed(fake.Now()) {
		t.Errorf("one that is long over became %v", got)
	}
}
