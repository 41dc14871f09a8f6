package ledger

import (
	"context"
	"path/filepath"
	"testing"

	"github.com/google/uuid"

	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/clock"
)

var (
	testKinds = capabilities.NewKinds(capabilities.FS{})
	partition = uuid.MustParse("99999999-9999-4999-8999-999999999999")
	holder    = uuid.MustParse("aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa")
	someone   = Actor{Kind: ActorBroker}
)

func open(t testing.TB, dir string, c clock.Clock) *Ledger {
	t.Helper()
	l, err := Open(context.Background(), Options{Dir: dir, Kinds: testKinds, Clock: c})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		if r, err := Verify(context.Background(), dir); err != nil || r.Broken != nil {
			if filepath.Base(dir) != "spoilt" {
				t.Errorf("the ledger is not whole after the test: %+v, %v", r.Broken, err)
			}
		}
	})
	return l
}

func capability(t testing.TB, path string) capabilities.Capability {
	t.Helper()
	c, err := testKinds.Parse("fs:rw:"+partition.String()+":"+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func put(t testing.TB, l *Ledger, events ...Event) {
	t.Helper()
	if err := try(l, events...); err != nil {
		t.Fatal(err)
	}
}

func try(l *Ledger, events ...Event) error {
	_, err := l.Update(context.Background(), func(tx *Tx) error {
		for _, e := range events {
			if err := tx.Append(e); err != nil {
				return err
			}
		}
		return nil
	})
	return err
}

func requested(id uuid.UUID, r GrantRecord) Event { return NewGrant(someone, id, holder, partition, r) }

func stateOf(l *Ledger, id uuid.UUID) (s GrantState) {
	l.View(func(st *State) {
		g, _ := st.Grant(id)
		s = g.State
	})
	return s
}

func live(l *Ledger, id uuid.UUID, now capabilities.Instant) (err error) {
	l.View(func(st *State) { err = st.Live(id, now) })
	return err
}
