package clock

import (
	"sync"
	"time"

	"spectrum-os.org/broker/capabilities"
)

// Fake is a clock that stands still until it is told to move. It does to its
// readings what a machine does to its own: running, suspending, being set,
// booting again. Safe for concurrent use.
type Fake struct {
	mu  sync.Mutex
	now capabilities.Instant
}

// NewFake starts at a fixed instant.
func NewFake() *Fake {
	return &Fake{now: capabilities.Instant{
		Wall:   time.Date(2025, time.June, 1, 12, 0, 0, 0, time.UTC),
		BootID: "b0070000-0000-4000-8000-000000000001",
		Boot:   time.Hour,
	}}
}

// Now is the current reading.
func (f *Fake) Now() capabilities.Instant {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.now
}

// Advance lets time pass, awake or suspended: both clocks run on.
func (f *Fake) Advance(d time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.now.Wall = f.now.Wall.Add(d)
	f.now.Boot += d
}

// SetWall sets the wall clock, forward or back, and leaves the other.
func (f *Fake) SetWall(wall time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.now.Wall = wall.Round(0).UTC()
}

// Reboot begins another boot after the machine was off for that long.
func (f *Fake) Reboot(bootID string, off time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.now.Wall = f.now.Wall.Add(off)
	f.now.BootID = bootID
	f.now.Boot = 0
}
