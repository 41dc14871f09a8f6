package ledger

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/clock"
)

func rotate(t testing.TB, l *Ledger) Rotation {
	t.Helper()
	r, err := l.Rotate(context.Background(), someone)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func noise(t testing.TB, l *Ledger, n int) {
	t.Helper()
	for range n {
		put(t, l, Event{Type: BrokerStarted, Actor: someone})
	}
}

func wholeLedger(t testing.TB, dir string, anchors ...Anchor) VerifyReport {
	t.Helper()
	r, err := Verify(context.Background(), dir, anchors...)
	if err != nil || r.Broken != nil {
		t.Fatalf("%+v, %v", r.Broken, err)
	}
	return r
}

// TestRotation follows the chain over two rotations: numbers and hashes go on, and
// all of it can be read and verified.
func TestRotation(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir, clock.NewFake())
	id, over := uuid.New(), uuid.New()
	put(t, l, requested(id, GrantRecord{Capability: capability(t, "/a")}),
		requested(over, GrantRecord{Capability: capability(t, "/a")}), NewChange(GrantFailed, someone, over, Change{}))
	noise(t, l, 6)
	var seen []Event
	collect := func() {
		t.Helper()
		after := uint64(0)
		if n := len(seen); n > 0 {
			after = seen[n-1].Seq
		}
		events, err := l.Events(after, EventFilter{}, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range events {
			if n := len(seen); n > 0 && (e.Seq != seen[n-1].Seq+1 || e.Prev != seen[n-1].Hash) {
				t.Fatalf("event %d does not follow event %d", e.Seq, seen[n-1].Seq)
			}
			seen = append(seen, e)
		}
	}
	collect()
	first := rotate(t, l)
	if first.Archive.First != 1 || first.Archive.Last != 10 || first.Grants != 1 {
		t.Errorf("the first rotation says %+v", first)
	}
	collect()
	if e := seen[10]; e.Type != LedgerRotated || seen[11].Type != LedgerCarried || string(seen[11].Data) != `{"carries":"grants","count":1}` {
		t.Errorf("the segment begins with %s, %s %s", e.Type, seen[11].Type, seen[11].Data)
	}
	if _, err := l.Rotate(t.Context(), someone); !errors.Is(err, ErrNothingToRotate) {
		t.Errorf("a rotation of nothing: %v", err)
	}
	put(t, l, NewChange(GrantActive, someone, id, Change{}))
	collect()
	second := rotate(t, l)
	noise(t, l, 3)
	collect()
	if err := l.Reopen(t.Context()); err != nil {
		t.Fatal(err)
	}
	noise(t, l, 1)
	collect()
	head, hash := l.Head()
	r := wholeLedger(t, dir, Anchor{head, hash}, Anchor{3, seen[2].Hash}, Anchor{12, seen[11].Hash})
	if r.First != 1 || r.Last != head || r.Events != int(head) || r.Anchors != 3 || len(r.Archives) != 2 ||
		r.Archives[0].ArchiveName != second.Archive || r.Archives[1].ArchiveName != first.Archive {
		t.Errorf("verified is %+v", r)
	}
	for _, from := range []uint64{3, 10, 11, 13, 15} {
		r, err := VerifyFrom(t.Context(), dir, Anchor{from, seen[from-1].Hash})
		if err != nil || r.Broken != nil || r.First != from || r.Last != head {
			t.Errorf("from %d: %+v, %v", from, r, err)
		}
	}
	// Each archive by itself, and an export that begins with a segment.
	for _, a := range []ArchiveName{first.Archive, second.Archive} {
		path := filepath.Join(dir, ArchiveDir, a.Name)
		r, err := VerifyArchive(t.Context(), path)
		if err != nil || r.Broken != nil || r.First != a.First || r.Last != a.Last {
			t.Errorf("archive %s: %+v, %v", a.Name, r, err)
		}
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("archive %s: %v, %v", a.Name, info, err)
		}
	}
	lines := exported(t, l, l.Segment().First-1)
	if r, err := VerifyExport(t.Context(), strings.NewReader(strings.Join(lines, ""))); err != nil || r.Broken != nil {
		t.Errorf("an export of a segment: %+v, %v", r.Broken, err)
	}
	a, err := OpenArchive(t.Context(), filepath.Join(dir, ArchiveDir, first.Archive.Name))
	if err != nil {
		t.Fatal(err)
	}
	p, err := a.Read(t.Context(), Reading{Filter: EventFilter{Grant: over}})
	if err = errors.Join(err, a.Close()); err != nil || len(p.Events) != 2 || p.Events[1].Hash != seen[3].Hash || p.More {
		t.Errorf("an ended grant in its archive: %+v, %v", p, err)
	}
	for digits, want := range map[string]bool{
		over.String(): true, over.String()[:9]: true, strings.ToUpper(over.String()[:8]): true, over.String()[:8] + "x": false,
		uuid.NewString(): false, "": false, over.String()[:4]: false,
	} {
		in, found, err := Archived(t.Context(), dir, digits)
		if err != nil || found != want || found && in != first.Archive {
			t.Errorf("%q is found: %v in %v, %v", digits, found, in, err)
		}
	}
}

// TestGap is of a reader whose cursor is in what was archived.
func TestGap(t *testing.T) {
	dir, fake := t.TempDir(), clock.NewFake()
	l := open(t, dir, fake)
	noise(t, l, 9)
	one := rotate(t, l)
	fake.Advance(time.Hour)
	noise(t, l, 9)
	two := rotate(t, l)
	noise(t, l, 2)
	first := l.Segment().First
	gap := func(r Reading) (*Gap, Page) {
		t.Helper()
		p, err := l.Read(t.Context(), r)
		if err != nil {
			t.Fatal(err)
		}
		return p.Gap, p
	}
	g, p := gap(Reading{After: 4, Limit: 1})
	if g == nil || g.First != 5 || g.Last != first-1 || g.Missing || !slices.Equal(g.Archives, []ArchiveName{one.Archive, two.Archive}) {
		t.Errorf("from the first archive on: %+v", g)
	}
	if len(p.Events) != 1 || p.Events[0].Seq != first || p.Next != first || !p.More {
		t.Errorf("it goes on with %+v", p)
	}
	if g, _ := gap(Reading{After: one.Archive.Last}); g == nil || !slices.Equal(g.Archives, []ArchiveName{two.Archive}) {
		t.Errorf("from the second archive on: %+v", g)
	}
	if g, p := gap(Reading{After: first - 1}); g != nil || p.Events[0].Seq != first {
		t.Errorf("at the segment's beginning: %+v", g)
	}
	if g, _ := gap(Reading{Filter: EventFilter{Since: fake.Now().Wall}}); g != nil {
		t.Errorf("of a time that is not archived: %+v", g)
	}
	if g, _ := gap(Reading{Filter: EventFilter{Since: fake.Now().Wall.Add(-time.Minute)}}); g == nil {
		t.Error("of a time that is archived there is no gap")
	}
	if err := os.Remove(filepath.Join(dir, ArchiveDir, one.Archive.Name)); err != nil {
		t.Fatal(err)
	}
	if g, _ := gap(Reading{}); g == nil || !g.Missing || !slices.Equal(g.Archives, []ArchiveName{two.Archive}) {
		t.Errorf("with an archive gone: %+v", g)
	}
	r := wholeLedger(t, dir)
	if r.First != two.Archive.First || len(r.Archives) != 2 || !r.Archives[1].Missing || r.Archives[0].Missing {
		t.Errorf("verified without an archive: %+v", r)
	}
	if r, err := Verify(t.Context(), dir, Anchor{2, Hash{1}}); err != nil || r.Broken == nil || r.Broken.Problem != BrokenAnchor || !strings.Contains(r.Broken.Detail, one.Archive.Name) {
		t.Errorf("an anchor in an archive that is gone: %+v, %v", r.Broken, err)
	}
	if r, err := VerifyFrom(t.Context(), dir, Anchor{2, Hash{1}}); err != nil || r.Broken == nil || !strings.Contains(r.Broken.Detail, "no archive that is there has it") {
		t.Errorf("from an archive that is gone: %+v, %v", r.Broken, err)
	}
}

// reseal makes a new, whole chain of what edit makes of a database's rows: what a
// hostile hand that can write the files would do.
func reseal(t *testing.T, path string, edit func(seq uint64, e *entry)) {
	t.Helper()
	db, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	rows, err := db.QueryContext(t.Context(), "SELECT seq, body FROM events ORDER BY seq")
	if err != nil {
		t.Fatal(err)
	}
	type row struct {
		seq  uint64
		body []byte
	}
	var all []row
	for rows.Next() {
		var r row
		if err := rows.Scan(&r.seq, &r.body); err != nil {
			t.Fatal(err)
		}
		all = append(all, r)
	}
	if err := errors.Join(rows.Err(), rows.Close()); err != nil {
		t.Fatal(err)
	}
	var prev Hash
	for i, r := range all {
		var e entry
		if err := decodeEvent(r.body, &e); err != nil {
			t.Fatal(err)
		}
		if i > 0 {
			e.Prev = prev
		}
		e.data = bytes.Clone(e.data)
		edit(r.seq, &e)
		body := encodeEvent(nil, &e.Event, e.dataKind, e.data)
		prev = hashRecord(body)
		if _, err := db.ExecContext(t.Context(), "UPDATE events SET body = ?, hash = ? WHERE seq = ?", body, prev[:], r.seq); err != nil {
			t.Fatal(err)
		}
	}
}

// TestRotationIsNotForged edits archives and segments, each with its chain made
// whole again, and wants the whole not to verify, for the reason that there is.
func TestRotationIsNotForged(t *testing.T) {
	id := uuid.New()
	make2 := func(t *testing.T) (dir string, archive string) {
		dir = filepath.Join(t.TempDir(), "spoilt")
		fake := clock.NewFake()
		l, err := Open(t.Context(), Options{Dir: dir, Kinds: testKinds, Clock: fake})
		if err != nil {
			t.Fatal(err)
		}
		put(t, l, requested(id, GrantRecord{Capability: capability(t, "/a"), Label: "one"}), NewChange(GrantActive, someone, id, Change{}))
		r := rotate(t, l)
		noise(t, l, 1)
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		return dir, filepath.Join(dir, ArchiveDir, r.Archive.Name)
	}
	replace := func(e *entry, old, new string) {
		if !bytes.Contains(e.data, []byte(old)) {
			t.Fatalf("%s holds no %q", e.Type, old)
		}
		e.data = bytes.Replace(e.data, []byte(old), []byte(new), 1)
	}
	for name, c := range map[string]struct {
		spoil func(t *testing.T, dir, archive string)
		says  string
	}{
		"a right is smuggled in": {func(t *testing.T, dir, _ string) {
			reseal(t, filepath.Join(dir, fileName), func(_ uint64, e *entry) {
				if e.Type == LedgerCarried && bytes.Contains(e.data, []byte("one")) {
					replace(e, `"path":"/a"`, `"path":"/b"`)
				}
			})
		}, "what was in force at its end is not what the events from 4 on say"},
		"the archive is another": {func(t *testing.T, _, archive string) {
			reseal(t, archive, func(_ uint64, e *entry) {
				if e.Type == GrantRequested {
					replace(e, "one", "two")
				}
			})
		}, "it ends with event 3"},
		"the archive is damaged": {func(t *testing.T, _, archive string) {
			spoilRow(t, archive, "UPDATE events SET body = CAST(substr(body, 1, length(body) - 1) || X'00' AS BLOB) WHERE seq = 2")
		}, "hash mismatch: in archive"},
		"the archive lacks its end": {func(t *testing.T, _, archive string) {
			spoilRow(t, archive, "DELETE FROM events WHERE seq = 3")
		}, "it ends with event 2"},
		"what is in force lacks": {func(t *testing.T, dir, _ string) {
			spoilRow(t, filepath.Join(dir, fileName), "DELETE FROM events WHERE seq > 4")
		}, "events of what is in force at its beginning are missing"},
		"the segment's first event lacks": {func(t *testing.T, dir, _ string) {
			spoilRow(t, filepath.Join(dir, fileName), "DELETE FROM events WHERE seq = 4")
		}, "the event before it is 0"},
		"its archive is one of another path": {func(t *testing.T, dir, _ string) {
			reseal(t, filepath.Join(dir, fileName), func(_ uint64, e *entry) {
				if e.Type == LedgerRotated {
					replace(e, "ledger-1-3-", "/../../1-3-")
				}
			})
		}, "is not the name of its archive"},
		"the epoch is another": {func(t *testing.T, dir, _ string) {
			reseal(t, filepath.Join(dir, fileName), func(_ uint64, e *entry) {
				if e.Type == LedgerRotated {
					replace(e, `"epoch":1`, `"epoch":7`)
				}
			})
		}, "in epoch 1"},
	} {
		t.Run(name, func(t *testing.T) {
			dir, archive := make2(t)
			wholeLedger(t, dir)
			c.spoil(t, dir, archive)
			r, err := Verify(t.Context(), dir)
			if err != nil || r.Broken == nil || !strings.Contains(r.Broken.Error(), c.says) {
				t.Errorf("%v, %v; want %q", r.Broken, err, c.says)
			}
		})
	}
}

func spoilRow(t *testing.T, path, query string) {
	t.Helper()
	db, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if r, err := db.ExecContext(t.Context(), query); err != nil {
		t.Fatal(err)
	} else if n, _ := r.RowsAffected(); n == 0 {
		t.Fatal("nothing was spoilt")
	}
}

// What begins a segment is not appended by anybody.
func TestSegmentsAreMadeByRotation(t *testing.T) {
	l := open(t, t.TempDir(), clock.NewFake())
	noise(t, l, 1)
	seq, hash := l.Head()
	data := JSON(RotatedData{Ledger: uuid.New(), Epoch: 1, First: 1, Last: seq, LastHash: hash})
	for _, e := range []Event{
		{Type: LedgerRotated, Actor: someone, Data: data}, {Type: LedgerCarried, Actor: someone, Data: JSON(carriedData{"grants", 1})}, {Type: LedgerCarried, Actor: someone},
	} {
		if err := try(l, e); !errors.Is(err, ErrIllegalMove) && !errors.Is(err, ErrInvalidEvent) {
			t.Errorf("%s was appended: %v", e.Type, err)
		}
	}
}

// TestRotateWhileAllGoesOn is for the race detector: grants, revocations, readers,
// followers and re-reading go on while the audit is rotated again and again. Each
// reader gets each event once, or is told of the gap.
func TestRotateWhileAllGoesOn(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir, clock.NewFake())
	c := capability(t, "/a")
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	stop := make(chan struct{})
	var writers, others sync.WaitGroup
	var mu sync.Mutex
	live := map[uuid.UUID]bool{}
	for range 3 {
		writers.Go(func() {
			for range 25 {
				kept, gone := uuid.New(), uuid.New()
				err := errors.Join(
					try(l, requested(kept, GrantRecord{Capability: c}), requested(gone, GrantRecord{Capability: c})),
					try(l, NewChange(GrantRevoking, someone, gone, Change{})), try(l, NewChange(GrantRevoked, someone, gone, Change{})))
				if err != nil {
					t.Error(err)
				}
				mu.Lock()
				live[kept] = true
				mu.Unlock()
			}
		})
	}
	for range 2 {
		others.Go(func() {
			next := uint64(1)
			wake := l.Subscribe(ctx)
			for {
				p, err := l.Read(ctx, Reading{After: next - 1, Limit: 17})
				if err != nil {
					t.Errorf("a reader after event %d: %v", next-1, err)
					return
				}
				if p.Gap != nil {
					if p.Gap.First != next || p.Gap.Missing {
						t.Errorf("the gap is %+v, want it from %d on", p.Gap, next)
					}
					next = p.Gap.Last + 1
				}
				for _, e := range p.Events {
					if e.Seq != next {
						t.Errorf("event %d came, want %d", e.Seq, next)
						return
					}
					next++
				}
				if p.More {
					continue
				}
				select {
				case <-wake:
				case <-stop:
					return
				}
			}
		})
	}
	others.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if err := l.Reopen(ctx); err != nil {
				t.Error(err)
			}
			time.Sleep(20 * time.Millisecond)
		}
	})
	rotations := 0
	others.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			switch _, err := l.Rotate(ctx, someone); {
			case err == nil:
				rotations++
			case errors.Is(err, ErrNothingToRotate):
			default:
				t.Error(err)
			}
		}
	})
	writers.Wait()
	close(stop)
	others.Wait()
	if rotations < 2 {
		t.Errorf("it was rotated %d times", rotations)
	}
	l.View(func(s *State) {
		if n := len(s.Grants(Filter{States: []GrantState{Pending}})); n != len(live) || n != 75 {
			t.Errorf("%d grants are in force, want %d", n, len(live))
		}
		for id := range live {
			if _, ok := s.Grant(id); !ok {
				t.Errorf("grant %s is lost", id)
			}
		}
	})
	if r := wholeLedger(t, dir); r.First != 1 || len(r.Archives) != rotations {
		t.Errorf("%d rotations, verified is %+v", rotations, r)
	}
}

// TestRotationThatCannotBeWritten leaves the ledger as it was, and says why.
func TestRotationThatCannotBeWritten(t *testing.T) {
	for name, c := range map[string]struct {
		block func(dir string) error
		says  string
	}{
		"a file in its place": {func(dir string) error { return os.WriteFile(filepath.Join(dir, ArchiveDir), nil, 0o600) }, "is not a directory"},
		"a link in its place": {func(dir string) error { return os.Symlink(t.TempDir(), filepath.Join(dir, ArchiveDir)) }, "is not a directory"},
		"others can write": {func(dir string) error {
			return errors.Join(os.Mkdir(filepath.Join(dir, ArchiveDir), 0o700), os.Chmod(filepath.Join(dir, ArchiveDir), 0o777))
		}, "others can write to it"},
		"an unfinished one that cannot go": {func(dir string) error {
			return os.MkdirAll(filepath.Join(dir, ArchiveDir, "unfinished", "x"), 0o700)
		}, "unfinished"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			l := open(t, dir, clock.NewFake())
			noise(t, l, 3)
			if err := c.block(dir); err != nil {
				t.Fatal(err)
			}
			_, err := l.Rotate(t.Context(), someone)
			if !errors.Is(err, ErrNotRecorded) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%v, want %q", err, c.says)
			}
			noise(t, l, 1)
			if s := l.Segment(); s.First != 1 || s.Last != 5 {
				t.Errorf("the segment is %+v", s)
			}
		})
	}
}

// What a rotation left that was broken off is removed by the next, and nothing else.
func TestRotationClearsUp(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir, clock.NewFake())
	noise(t, l, 3)
	_, hash := l.Head()
	other := t.TempDir()
	l2 := open(t, other, clock.NewFake())
	noise(t, l2, 3)
	foreign := rotate(t, l2).Archive.Name // of another ledger, of as many events
	at := func(name string) string { return filepath.Join(dir, ArchiveDir, name) }
	// A rotation that was killed before it was committed.
	a, err := newArchive(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	s, head, err := l.borrow()
	if err == nil {
		err = a.add(t.Context(), s, head)
		s.reading.Done()
	}
	if err != nil {
		t.Fatal(err)
	}
	left, err := a.finish()
	if err != nil {
		t.Fatal(err)
	}
	if want := archiveName(1, 4, hash); left.Name != want {
		t.Errorf("it is called %s, want %s", left.Name, want)
	}
	b, err := os.ReadFile(filepath.Join(other, ArchiveDir, foreign))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{foreign, "unfinished", "notes.txt"} {
		if err := os.WriteFile(at(name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	noise(t, l, 1)
	made := rotate(t, l).Archive.Name
	entries, err := os.ReadDir(filepath.Join(dir, ArchiveDir))
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	want := []string{foreign, made, "notes.txt"}
	slices.Sort(want)
	if err != nil || !slices.Equal(names, want) {
		t.Errorf("there are %v, want %v; %v", names, want, err)
	}
	if err := os.Remove(at(foreign)); err != nil {
		t.Fatal(err)
	}
}

// BenchmarkRotate carries 100,000 live grants, and says for how long nothing else
// could be recorded.
func BenchmarkRotate(b *testing.B) {
	const grants = 100_000
	l := open(b, b.TempDir(), clock.System{})
	for n := 0; n < grants; n += 1000 {
		_, err := l.Update(context.Background(), func(tx *Tx) error {
			for i := range 1000 {
				g := GrantRecord{Capability: capability(b, fmt.Sprintf("/d%d", i%100)), Decision: []byte(`{"verdict":{"outcome":"allow","summary":"work allows it (grant.rego:12)"}}`)}
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
	var blocked time.Duration
	for b.Loop() {
		noise(b, l, 1)
		blocked += rotate(b, l).Blocked
	}
	b.ReportMetric(float64(blocked.Milliseconds())/float64(b.N), "ms-blocked")
	b.ReportMetric(float64(blocked.Microseconds())/float64(b.N)/(grants/1000), "µs-blocked/1000-grants")
}
