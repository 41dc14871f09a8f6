package ledger

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"spectrum-os.org/broker/clock"
)

// TestRotationOfUnknownOutcome: the new segment is on the disk, and whoever wrote
// it was not told. It is found when the ledger is read again, and goes on.
func TestRotationOfUnknownOutcome(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir, clock.NewFake())
	must(t, l.Mark())
	id := granted(t, l, "/a")
	noise(t, l, 5)
	last, hash := l.Head()
	path := filepath.Join(dir, fileName)
	must(t, os.Rename(path, path+".away"))
	if _, err := l.Rotate(context.Background(), someone); !errors.Is(err, ErrUnknownOutcome) {
		t.Fatalf("got %v", err)
	}
	must(t, os.Rename(path+".away", path))
	must(t, l.Reopen(context.Background()))
	if got := l.Segment(); got.First != last+1 || got.Archive.LastHash != hash {
		t.Errorf("the segment is %+v", got)
	}
	if got := stateOf(l, id); got != Active {
		t.Errorf("the grant is %q", got)
	}
	noise(t, l, 1)
	wholeLedger(t, dir, Anchor{last, hash})
}

// TestRotationKeepsTime: what ties this boot's time to the wall clock's outlives a
// rotation, and the reading of what it wrote.
func TestRotationKeepsTime(t *testing.T) {
	dir, c := t.TempDir(), clock.NewFake()
	l := open(t, dir, c)
	try(l, NewMark(someone, c.Now())) //nolint:errcheck // looked at below
	was := l.root.meta.anchor
	if !was.set {
		t.Fatal("nothing ties them")
	}
	rotate(t, l)
	if now := l.root.meta.anchor; !now.set {
		t.Errorf("after a rotation: %+v, was %+v", now, was)
	}
	must(t, l.Close())
	l = open(t, dir, c)
	if now := l.root.meta.anchor; !now.set {
		t.Errorf("after a start: %+v, was %+v", now, was)
	}
}
