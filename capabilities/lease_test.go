package capabilities

import (
	"encoding/json"
	"math"
	"testing"
	"time"

	"pgregory.net/rapid"
)

var leaseStart = Instant{
	Wall:   time.Date(2025, time.June, 1, 12, 0, 0, 0, time.UTC),
	BootID: "boot-1",
	Boot:   time.Hour,
}

func TestDeadline(t *testing.T) {
	d := NewDeadline(leaseStart, time.Minute)
	at := func(wall, boot time.Duration, id string) Instant {
		return Instant{Wall: leaseStart.Wall.Add(wall), BootID: id, Boot: leaseStart.Boot + boot}
	}
	for _, tc := range []struct {
		name string
		now  Instant
		left time.Duration
	}{
		{"at once", leaseStart, time.Minute},
		{"half way", at(30*time.Second, 30*time.Second, "boot-1"), 30 * time.Second},
		{"at the end", at(time.Minute, time.Minute, "boot-1"), 0},
		{"after it", at(time.Hour, time.Hour, "boot-1"), 0},
		{"wall set back", at(-24*time.Hour, time.Minute, "boot-1"), 0},
		{"wall set back, not over", at(-24*time.Hour, 59*time.Second, "boot-1"), time.Second},
		{"wall set forward", at(time.Hour, time.Second, "boot-1"), 0},
		{"another boot", at(59*time.Second, -time.Hour, "boot-2"), time.Second},
		{"another boot, over by wall", at(time.Minute, -time.Hour, "boot-2"), 0},
		{"another boot, its clock further on", at(time.Second, 9*time.Hour, "boot-2"), 59 * time.Second},
		{"no boot known", at(59*time.Second, 0, ""), time.Second},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := d.Remaining(tc.now); got != tc.left {
				t.Errorf("remaining %s, want %s", got, tc.left)
			}
			if got := d.Passed(tc.now); got != (tc.left == 0) {
				t.Errorf("passed is %v", got)
			}
		})
	}
}

func TestDeadlineEdges(t *testing.T) {
	if none := (Deadline{}); !none.IsZero() || none.Passed(leaseStart) || none.Remaining(leaseStart) != math.MaxInt64 {
		t.Error("the zero deadline ends")
	}
	for _, ttl := range []time.Duration{0, -time.Hour, math.MinInt64} {
		if !NewDeadline(leaseStart, ttl).Passed(leaseStart) {
			t.Errorf("a lease of %s runs", ttl)
		}
	}
	if d := NewDeadline(leaseStart, math.MaxInt64); d.Passed(leaseStart) || d.Boot != math.MaxInt64 {
		t.Errorf("the longest lease wraps: %+v", d)
	}
	// A deadline that lost its wall half is over, not endless.
	if d := (Deadline{BootID: "boot-1", Boot: 2 * time.Hour}); !d.Passed(leaseStart) {
		t.Error("half a deadline runs")
	}
}

func TestDeadlineForgetsGoMonotonicClock(t *testing.T) {
	now := Instant{Wall: time.Now(), BootID: "boot-1"}
	if d := NewDeadline(now, time.Minute); d.Wall != d.Wall.Round(0) {
		t.Error("the wall half carries a monotonic reading, which stops in a suspend")
	}
}

func TestDeadlineJSON(t *testing.T) {
	for _, d := range []Deadline{{}, NewDeadline(leaseStart, 90*time.Second+time.Nanosecond), NewDeadline(Instant{Wall: leaseStart.Wall}, 1)} {
		encoded, err := json.Marshal(d)
		if err != nil {
			t.Fatal(err)
		}
		var back Deadline
		if err := json.Unmarshal(encoded, &back); err != nil || back != d {
			t.Errorf("%s decodes as %+v, %v", encoded, back, err)
		}
	}
	if encoded, _ := json.Marshal(Deadline{}); string(encoded) != "{}" {
		t.Errorf("no deadline is %s", encoded)
	}
}

// Whatever the clocks do, a lease is over once boot time has run its length
// in one boot, and once wall time has reached its end.
func TestNoClockExtendsALease(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		ttl := time.Duration(rapid.Int64Range(0, int64(time.Hour)).Draw(t, "ttl"))
		d := NewDeadline(leaseStart, ttl)
		now := leaseStart
		boots := 1
		for range rapid.IntRange(1, 8).Draw(t, "steps") {
			step := time.Duration(rapid.Int64Range(0, int64(time.Hour)).Draw(t, "step"))
			switch rapid.SampledFrom([]string{"run", "set back", "set on", "reboot"}).Draw(t, "what") {
			case "run":
				now.Wall, now.Boot = now.Wall.Add(step), now.Boot+step
			case "set back":
				now.Wall = now.Wall.Add(-step)
			case "set on":
				now.Wall = now.Wall.Add(step)
			case "reboot":
				boots++
				now.BootID, now.Boot = string(rune('a'+boots)), 0
			}
			over := !now.Wall.Before(leaseStart.Wall.Add(ttl)) || boots == 1 && now.Boot-leaseStart.Boot >= ttl
			if d.Passed(now) != over {
				t.Fatalf("passed is %v at %+v, a lease of %s", d.Passed(now), now, ttl)
			}
		}
	})
}

func TestEarliest(t *testing.T) {
	long, short := NewDeadline(leaseStart, time.Hour), NewDeadline(leaseStart, time.Minute)
	later := Instant{Wall: leaseStart.Wall.Add(-time.Hour), BootID: "boot-1", Boot: leaseStart.Boot + 30*time.Second}
	if got := Earliest(later, Deadline{}, long, short).Remaining(later); got != 30*time.Second {
		t.Errorf("remaining %s, want 30s", got)
	}
	if got := Earliest(leaseStart, Deadline{}, Deadline{}); !got.IsZero() {
		t.Errorf("of none it is %+v", got)
	}
	rapid.Check(t, func(t *rapid.T) {
		a := NewDeadline(leaseStart, time.Duration(rapid.Int64Range(0, 1000).Draw(t, "a")))
		b := NewDeadline(leaseStart, time.Duration(rapid.Int64Range(0, 1000).Draw(t, "b")))
		now := leaseStart
		now.Wall = now.Wall.Add(time.Duration(rapid.Int64Range(-2000, 2000).Draw(t, "wall")))
		now.Boot += time.Duration(rapid.Int64Range(0, 2000).Draw(t, "boot"))
		e := Earliest(now, a, b)
		if e.Passed(now) != (a.Passed(now) || b.Passed(now)) {
			t.Fatal("it is over and neither is, or the other way round")
		}
	})
}
