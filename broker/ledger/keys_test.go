package ledger

import (
	"context"
	"crypto/ed25519"
	"database/sql"
	"errors"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"

	"spectrum-os.org/broker/clock"
)

func testKey(t testing.TB) ed25519.PublicKey {
	t.Helper()
	public, _, err := ed25519.GenerateKey(nil)
	must(t, err)
	return public
}

// cutLast takes the newest event out of a closed ledger.
func cutLast(t *testing.T, dir string) {
	t.Helper()
	db, err := sql.Open("sqlite", filepath.Join(dir, fileName))
	must(t, err)
	_, err = db.ExecContext(context.Background(), "DELETE FROM events WHERE seq = (SELECT max(seq) FROM events)")
	must(t, errors.Join(err, db.Close()))
}

func granted(t testing.TB, l *Ledger, path string) uuid.UUID {
	t.Helper()
	id := uuid.New()
	put(t, l, requested(id, GrantRecord{Capability: capability(t, path)}), NewChange(GrantActive, someone, id, Change{}))
	return id
}

func signedBySet(l *Ledger, kid string) (out []uuid.UUID) {
	l.View(func(s *State) { out = s.SignedBy(kid) })
	return out
}

// TestWhichKeySignsForWhat: the key that was current, and the one that a
// token.issued names; what ended is not counted.
func TestWhichKeySignsForWhat(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir, clock.NewFake())
	must(t, l.Mark())
	before := granted(t, l, "/before")
	first, second := testKey(t), testKey(t)
	put(t, l, NewKey(someone, first))
	one := granted(t, l, "/one")
	gone := granted(t, l, "/gone")
	put(t, l, NewKey(someone, second))
	two := granted(t, l, "/two")
	put(t, l,
		Event{Type: TokenIssued, Actor: someone, Grant: one, Data: JSON(IssuedData{KID(second)})},
		Event{Type: TokenIssued, Actor: someone, Grant: two, Data: JSON(IssuedData{KID(second)})},
		Event{Type: TokenIssued, Actor: someone, Grant: two}, // as releases before wrote it
		NewChange(GrantRevoking, someone, gone, Change{}))

	look := func(l *Ledger) {
		t.Helper()
		if got := signedBySet(l, KID(first)); !slices.Equal(got, []uuid.UUID{before, one}) {
			t.Errorf("the first key signs for %v, want what was made before and during its time", got)
		}
		if got := signedBySet(l, KID(second)); !slices.Equal(got, []uuid.UUID{one, two}) {
			t.Errorf("the second key signs for %v, want %v and %v", got, one, two)
		}
		l.View(func(s *State) {
			current, ok := s.CurrentKey()
			old, _ := s.Key(KID(first))
			if !ok || current.KID != KID(second) || !current.Current || old.Current || old.Retired.IsZero() || !old.Revoked.IsZero() {
				t.Errorf("current is %+v, and the old one is %+v", current, old)
			}
			if !s.Signs(KID(second), one) || s.Signs(KID(second), before) || s.Signs("00", one) || s.Signs(KID(first), uuid.New()) {
				t.Error("Signs says otherwise")
			}
			if len(l.root.signed) != 1 {
				t.Errorf("%d extra signatures are kept in memory, want that of one grant", len(l.root.signed))
			}
		})
	}
	look(l)
	must(t, l.Close())
	again := open(t, dir, clock.NewFake())
	look(again)
	// In one Update the time of a key ends where the next one's begins.
	third := testKey(t)
	put(t, again, NewKey(someone, third), Event{Type: KeyRevoked, Actor: someone, Data: JSON(KeyRevokedData{KID(second), "stolen"})})
	again.View(func(s *State) {
		k, _ := s.Key(KID(second))
		if k.Revoked.IsZero() || k.Reason != "stolen" || len(s.Keys()) != 3 {
			t.Errorf("the revoked key is %+v", k)
		}
	})
	after := granted(t, again, "/after")
	if got := signedBySet(again, KID(second)); slices.Contains(got, after) {
		t.Error("a revoked key signs for what was made later")
	}
}

func TestIllegalKeyEvents(t *testing.T) {
	l := open(t, t.TempDir(), clock.NewFake())
	first, second := testKey(t), testKey(t)
	put(t, l, NewKey(someone, first), NewKey(someone, second))
	revoke := func(kid string) Event {
		return Event{Type: KeyRevoked, Actor: someone, Data: JSON(KeyRevokedData{KID: kid})}
	}
	put(t, l, revoke(KID(first)))
	for name, c := range map[string]struct {
		event Event
		want  error
		says  string
	}{
		"a key twice":                 {NewKey(someone, second), ErrIllegalMove, "exists already"},
		"a revoked key again":         {NewKey(someone, first), ErrIllegalMove, "exists already"},
		"a short key":                 {NewKey(someone, second[:31]), ErrInvalidEvent, "is not that of kid"},
		"another key's id":            {Event{Type: KeyCreated, Actor: someone, Data: JSON(KeyCreatedData{KID(first), testKey(t)})}, ErrInvalidEvent, "is not that of kid"},
		"no data":                     {Event{Type: KeyCreated, Actor: someone}, ErrInvalidEvent, "is not that of kid"},
		"revoking the current key":    {revoke(KID(second)), ErrIllegalMove, "is the current one"},
		"revoking twice":              {revoke(KID(first)), ErrIllegalMove, "is revoked already"},
		"revoking a stranger's":       {revoke(KID(testKey(t))), ErrIllegalMove, "there is no key"},
		"revoking nothing":            {Event{Type: KeyRevoked, Actor: someone}, ErrIllegalMove, "there is no key"},
		"a token of a stranger's key": {Event{Type: TokenIssued, Actor: someone, Grant: uuid.New(), Data: JSON(IssuedData{"0011223344556677"})}, ErrIllegalMove, "which does not exist"},
	} {
		var was, is []Key
		l.View(func(s *State) { was = s.Keys() })
		err := try(l, c.event)
		if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: got %v, want %v saying %q", name, err, c.want, c.says)
		}
		l.View(func(s *State) { is = s.Keys() })
		if !reflect.DeepEqual(was, is) {
			t.Errorf("%s: the keys were %v and are %v", name, was, is)
		}
	}
}

// TestDroppedUpdateDropsItsKeys: what an Update appended before it failed is not
// seen by those that share its commit.
func TestDroppedUpdateDropsItsKeys(t *testing.T) {
	l := open(t, t.TempDir(), clock.NewFake())
	put(t, l, NewKey(someone, testKey(t)))
	var before, after []Key
	l.View(func(s *State) { before = s.Keys() })
	enough := errors.New("enough")
	_, err := l.Update(context.Background(), func(tx *Tx) error {
		must(t, tx.Append(NewKey(someone, testKey(t))))
		if n := len(tx.State().Keys()); n != 2 {
			t.Errorf("the Update sees %d keys of its own", n)
		}
		return enough
	})
	if !errors.Is(err, enough) {
		t.Fatal(err)
	}
	l.View(func(s *State) { after = s.Keys() })
	if !reflect.DeepEqual(before, after) {
		t.Errorf("the keys were %v and are %v", before, after)
	}
}
