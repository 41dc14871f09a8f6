package clock

import (
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/capabilities"
)

func TestSystemReadsBothClocks(t *testing.T) {
	id, err := BootID()
	if err != nil {
		t.Fatal(err)
	}
	if parsed, err := uuid.Parse(id); err != nil || parsed.String() != id {
		t.Errorf("boot id %q is not a UUID: %v", id, err)
	}
	first := System{}.Now()
	if first.BootID != id {
		t.Errorf("reading is of boot %q, this is %q", first.BootID, id)
	}
	if off := time.Since(first.Wall); off < -time.Second || off > time.Minute {
		t.Errorf("wall time is off by %s", off)
	}
	if first.Wall != first.Wall.Round(0) {
		t.Error("wall time carries Go's monotonic reading, which stops in a suspend")
	}
	if first.Wall.Location() != time.UTC {
		t.Errorf("wall time is in %s", first.Wall.Location())
	}
	time.Sleep(2 * time.Millisecond)
	second := System{}.Now()
	if first.Boot <= 0 || second.Boot-first.Boot < 2*time.Millisecond {
		t.Errorf("boot time went from %s to %s in 2 ms", first.Boot, second.Boot)
	}
}

func TestSystemEndsALease(t *testing.T) {
	d := capabilities.NewDeadline(System{}.Now(), 3*time.Millisecond)
	if d.Passed(System{}.Now()) && d.Remaining(System{}.Now()) > 0 {
		t.Error("a lease is over and has time left")
	}
	time.Sleep(4 * time.Millisecond)
	if !d.Passed(System{}.Now()) {
		t.Error("a lease of 3 ms runs after 4 ms")
	}
}

// Each thing that a Fake does, seen by a lease of a minute.
func TestFake(t *testing.T) {
	for _, tc := range []struct {
		name string
		do   func(*Fake)
		over bool
	}{
		{"nothing", func(*Fake) {}, false},
		{"not long enough", func(f *Fake) { f.Advance(time.Minute - 1) }, false},
		{"long enough", func(f *Fake) { f.Advance(time.Minute) }, true},
		{"set back and long enough", func(f *Fake) {
			f.SetWall(f.Now().Wall.AddDate(-1, 0, 0))
			f.Advance(time.Minute)
		}, true},
		{"set on", func(f *Fake) { f.SetWall(f.Now().Wall.Add(time.Hour)) }, true},
		{"rebooted at once", func(f *Fake) { f.Reboot("another", time.Second) }, false},
		{"off for long enough", func(f *Fake) { f.Reboot("another", time.Minute) }, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := NewFake()
			d := capabilities.NewDeadline(f.Now(), time.Minute)
			tc.do(f)
			var c Clock = f
			if got := d.Passed(c.Now()); got != tc.over {
				t.Errorf("the lease is over: %v, want %v", got, tc.over)
			}
		})
	}
}
