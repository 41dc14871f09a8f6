package ledger

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"spectrum-os.org/broker/clock"
)

// BenchmarkCommitRatio is one durable event over an append and an fdatasync of
// as many bytes, turn by turn, so that both meet the same disk.
func BenchmarkCommitRatio(b *testing.B) {
	dir := b.TempDir()
	l := open(b, dir, clock.System{})
	probe, err := os.Create(filepath.Join(dir, "probe"))
	if err != nil {
		b.Fatal(err)
	}
	defer probe.Close()
	// What SQLite writes for one event: a page and its header in the log.
	page := make([]byte, 4096+24)
	c := capability(b, "/a")
	var bare, durable time.Duration
	for b.Loop() {
		start := time.Now()
		if _, err := probe.Write(page); err != nil {
			b.Fatal(err)
		}
		if err := unix.Fdatasync(int(probe.Fd())); err != nil {
			b.Fatal(err)
		}
		middle := time.Now()
		put(b, l, requested(uuid.New(), GrantRecord{Capability: c}))
		bare += middle.Sub(start)
		durable += time.Since(middle)
	}
	b.ReportMetric(float64(durable)/float64(bare), "ratio")
	b.ReportMetric(float64(durable.Microseconds())/float64(b.N), "µs/commit")
}

// BenchmarkLoad opens a ledger of 100,000 grants.
func BenchmarkLoad(b *testing.B) {
	const grants = 100_000
	dir := b.TempDir()
	o := Options{Dir: dir, Kinds: testKinds, Clock: clock.System{}}
	l, err := Open(context.Background(), o)
	if err != nil {
		b.Fatal(err)
	}
	for n := 0; n < grants; n += 1000 {
		_, err := l.Update(context.Background(), func(tx *Tx) error {
			for i := range 1000 {
				g := GrantRecord{Capability: capability(b, fmt.Sprintf("/d%d", i%100)), Decision: []byte(`{"outcome":"allow"}`)}
				if err := tx.Append(requested(uuid.New(), g)); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			b.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		b.Fatal(err)
	}
	memory := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before, after := memory(), uint64(0)
	for b.Loop() {
		l, err := Open(context.Background(), o)
		if err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		after = memory()
		if err := l.Close(); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
	b.ReportMetric(float64(b.N)*grants/b.Elapsed().Seconds(), "grants/s")
	b.ReportMetric(float64(after-before)/grants, "B/grant")
}
