package ledger

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/uuid"

	"spectrum-os.org/broker/clock"
)

// marked is a closed ledger with some events, in a directory that knows it.
func marked(t *testing.T, dir string, names int) Mark {
	t.Helper()
	l, err := Open(context.Background(), Options{Dir: dir, Kinds: testKinds, Clock: clock.NewFake()})
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Mark(); err != nil {
		t.Fatal(err)
	}
	for range names {
		put(t, l, Event{Type: BrokerStarted, Actor: someone, Data: JSON(uuid.New())})
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return theMark(t, dir)
}

func theMark(t *testing.T, dir string) Mark {
	t.Helper()
	m, has, err := readMark(dir)
	if err != nil || !has {
		t.Fatalf("the mark is %v, %v, %v", m, has, err)
	}
	return m
}

// aside copies the closed database elsewhere, and returns what puts it back.
func aside(t *testing.T, dir string) (putBack func()) {
	t.Helper()
	must(t, foldLog(context.Background(), filepath.Join(dir, fileName)))
	body, err := os.ReadFile(filepath.Join(dir, fileName))
	must(t, err)
	return func() {
		must(t, foldLog(context.Background(), filepath.Join(dir, fileName)))
		must(t, os.WriteFile(filepath.Join(dir, fileName), body, 0o600))
	}
}

func tryOpen(dir string) error {
	l, err := Open(context.Background(), Options{Dir: dir, Kinds: testKinds, Clock: clock.NewFake()})
	if err == nil {
		err = l.Close()
	}
	return err
}

func TestMarkFollows(t *testing.T) {
	dir := t.TempDir()
	first := marked(t, dir, 0)
	if first.Seq != 1 || first.Epoch != 1 {
		t.Fatalf("a new ledger's mark is %+v", first)
	}
	info, err := os.Stat(filepath.Join(dir, markName))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("its mode is %v, %v", info.Mode(), err)
	}
	if m := marked(t, dir, 7); m.Seq != 8 || m.Ledger != first.Ledger {
		t.Errorf("closed after 8 events, and the mark is %+v", m)
	}
	l := open(t, dir, clock.NewFake())
	// Little is marked later; a new key at once.
	put(t, l, Event{Type: BrokerStarted, Actor: someone})
	key := testKey(t)
	put(t, l, NewKey(someone, key))
	if err := l.Mark(); err != nil { // it waits for the writer to come to it
		t.Fatal(err)
	}
	if m := theMark(t, dir); m.Seq != 10 {
		t.Errorf("after a key the mark is %+v", m)
	}
	if r, err := Verify(context.Background(), dir); err != nil || r.Broken != nil {
		t.Errorf("beside the open ledger: %+v, %v", r.Broken, err)
	}
}

// TestMarkIsNeverAhead reads the mark after each commit and looks for its event
// in what is stored.
func TestMarkIsNeverAhead(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir, clock.NewFake())
	if err := l.Mark(); err != nil {
		t.Fatal(err)
	}
	for range 5 {
		put(t, l, make2000()...)
		m := theMark(t, dir)
		events, err := l.Events(m.Seq-1, EventFilter{}, 1)
		if err != nil || len(events) != 1 || events[0].Hash != m.Hash {
			t.Fatalf("the mark names event %d, which is %v, %v", m.Seq, events, err)
		}
	}
}

func make2000() []Event {
	out := make([]Event, 2000)
	for i := range out {
		out[i] = Event{Type: BrokerStarted, Actor: someone}
	}
	return out
}

func TestSwappedLedgerIsRefused(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(t *testing.T, dir string)
		says  []string
	}{
		"an older copy": {func(t *testing.T, dir string) {
			putBack := aside(t, dir)
			marked(t, dir, 3)
			putBack()
		}, []string{"an older copy was put back, or its end was cut off", "up to event 6", "with event 9 being"}},
		"an older copy that grew on its own": {func(t *testing.T, dir string) {
			putBack := aside(t, dir)
			marked(t, dir, 3)
			putBack()
			m := filepath.Join(dir, markName)
			away := m + ".away"
			must(t, os.Rename(m, away))
			marked(t, dir, 20)
			must(t, os.Rename(away, m))
		}, []string{"it has another event 9", "its history is another"}},
		"another ledger": {func(t *testing.T, dir string) {
			other := t.TempDir()
			marked(t, other, 50)
			aside(t, other)
			aside(t, dir)
			must(t, os.Rename(filepath.Join(other, fileName), filepath.Join(dir, fileName)))
		}, []string{"it is another ledger"}},
		"cut short": {func(t *testing.T, dir string) {
			cutLast(t, dir)
		}, []string{"its end was cut off", "up to event 5", "with event 6 being"}},
		"deleted": {func(t *testing.T, dir string) {
			must(t, os.Remove(filepath.Join(dir, fileName)))
		}, []string{"the database is gone"}},
		"emptied": {func(t *testing.T, dir string) {
			must(t, os.Truncate(filepath.Join(dir, fileName), 0))
		}, []string{"the database is empty"}},
		"anchor is garbage": {func(t *testing.T, dir string) {
			must(t, os.WriteFile(filepath.Join(dir, markName), []byte("{}"), 0o600))
		}, []string{"its anchor ledger.anchor is damaged: it names no event"}},
		"anchor cut short": {func(t *testing.T, dir string) {
			must(t, os.Truncate(filepath.Join(dir, markName), 30))
		}, []string{"damaged: unexpected EOF"}},
		"anchor with more in it": {func(t *testing.T, dir string) {
			m := theMark(t, dir)
			body, _ := json.Marshal(m)
			must(t, os.WriteFile(filepath.Join(dir, markName), append(body, body...), 0o600))
		}, []string{"damaged: there is more after it"}},
		"anchor of a later event": {func(t *testing.T, dir string) {
			m := theMark(t, dir)
			m.Seq++
			must(t, writeMark(dir, m))
		}, []string{"an older copy was put back, or its end was cut off"}},
		"anchor of another event": {func(t *testing.T, dir string) {
			m := theMark(t, dir)
			m.Hash[3] ^= 1
			must(t, writeMark(dir, m))
		}, []string{"it has another event 6"}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "spoilt")
			marked(t, dir, 5)
			c.spoil(t, dir)
			anchor, _ := os.ReadFile(filepath.Join(dir, markName))
			for range 2 { // being refused once makes nothing right
				err := tryOpen(dir)
				if !errors.Is(err, ErrSwapped) {
					t.Fatalf("got %v, want %v", err, ErrSwapped)
				}
				for _, say := range append(c.says, "spectrum-cap ledger restore --state "+dir+" FILE", "empty "+dir) {
					if !strings.Contains(err.Error(), say) {
						t.Errorf("it does not say %q: %v", say, err)
					}
				}
			}
			if now, _ := os.ReadFile(filepath.Join(dir, markName)); string(now) != string(anchor) {
				t.Errorf("refusing it changed the anchor from %s to %s", anchor, now)
			}
			r, err := Verify(context.Background(), dir)
			if err == nil && (r.Broken == nil || r.Broken.Problem != BrokenAnchor) {
				t.Errorf("Verify finds %+v", r.Broken)
			}
			if err != nil && !errors.Is(err, ErrSwapped) {
				t.Errorf("Verify: %v", err)
			}
		})
	}
}

// TestAnchorOlderThanTheLedger is what a crash leaves between a commit and the
// mark, and is fine.
func TestAnchorOlderThanTheLedger(t *testing.T) {
	dir := t.TempDir()
	old := marked(t, dir, 5)
	marked(t, dir, 5)
	must(t, writeMark(dir, old))
	if m := marked(t, dir, 0); m.Seq != 11 {
		t.Errorf("the mark is %+v, want that of event 11", m)
	}
}

// TestKeysWithoutAnAnchor: whoever makes a first key has marked the ledger, so
// that a copy without an anchor is none of a release that had none.
func TestKeysWithoutAnAnchor(t *testing.T) {
	dir := t.TempDir()
	l, err := Open(context.Background(), Options{Dir: dir, Kinds: testKinds, Clock: clock.NewFake()})
	must(t, err)
	must(t, l.Mark())
	put(t, l, NewKey(someone, testKey(t)))
	must(t, l.Close())
	must(t, os.Remove(filepath.Join(dir, markName)))
	if err := tryOpen(dir); !errors.Is(err, ErrSwapped) || !strings.Contains(err.Error(), "its anchor is gone") {
		t.Errorf("got %v", err)
	}
}

// TestReopenLooksAtTheAnchor swaps the file under an open ledger.
func TestReopenLooksAtTheAnchor(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "spoilt")
	marked(t, dir, 5)
	l := open(t, dir, clock.NewFake())
	for _, name := range []string{fileName, fileName + "-wal", fileName + "-shm"} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
	}
	if err := l.Reopen(context.Background()); !errors.Is(err, ErrGone) || !strings.Contains(err.Error(), "was deleted") {
		t.Errorf("got %v", err)
	}
	if err := try(l, Event{Type: BrokerStarted, Actor: someone}); !errors.Is(err, ErrPoisoned) {
		t.Errorf("it is written to: %v", err)
	}
	if _, err := os.Lstat(filepath.Join(dir, fileName)); !os.IsNotExist(err) {
		t.Errorf("a new ledger was made: %v", err)
	}
}

// TestMarkOfASegment: the event that is marked may be the one before the first
// that is stored.
func TestMarkOfASegment(t *testing.T) {
	w := &witness{has: true, mark: Mark{uuid.New(), 1, Anchor{41, Hash{1}}}}
	w.see(&entry{Event: Event{Seq: 42, Prev: Hash{2}}}, Hash{3})
	if w.seen {
		t.Error("another event's successor counts")
	}
	w.see(&entry{Event: Event{Seq: 42, Prev: Hash{1}}}, Hash{3})
	if !w.seen || w.judge(&meta{ledger: w.mark.Ledger, epoch: 1, seq: 42}) != nil {
		t.Error("the link to the event that is marked does not count")
	}
}

// TestMarkThatCannotBeWritten does not stop the ledger.
func TestMarkThatCannotBeWritten(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir, clock.NewFake())
	must(t, l.Mark())
	was := theMark(t, dir)
	must(t, os.Mkdir(filepath.Join(dir, markName+".new"), 0o700))
	put(t, l, NewKey(someone, testKey(t)))
	if err := l.Mark(); err == nil {
		t.Error("a mark was written")
	}
	if m := theMark(t, dir); m != was {
		t.Errorf("the mark is %+v, want the last good one", m)
	}
	must(t, os.Remove(filepath.Join(dir, markName+".new")))
	must(t, l.Mark())
	if m := theMark(t, dir); m.Seq != 2 {
		t.Errorf("the mark is %+v", m)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
