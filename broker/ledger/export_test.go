package ledger

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/uuid"

	"spectrum-os.org/broker/clock"
)

// exported is an export of l from behind an event on, and its lines.
func exported(t testing.TB, l *Ledger, after uint64) []string {
	t.Helper()
	p, err := l.Read(context.Background(), Reading{After: after, Records: true})
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	x := NewExporter(&b)
	for _, r := range p.Records {
		if err := x.Add(r); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := x.End(); err != nil {
		t.Fatal(err)
	}
	return strings.SplitAfter(strings.TrimSuffix(b.String(), "\n"), "\n")
}

// lively is a ledger with events of several shapes, the data of one of which has
// characters that JSON may escape.
func lively(t testing.TB) *Ledger {
	l := open(t, t.TempDir(), clock.NewFake())
	id := uuid.New()
	put(t, l,
		requested(id, GrantRecord{Capability: capability(t, "/a"), Label: "a<b>&\u2028", Decision: []byte(`{"verdict":{"outcome":"allow"}}`)}),
		NewChange(GrantActive, someone, id, Change{Reason: "<&>"}),
		Event{Type: BrokerStarted, Actor: someone},
		NewChange(GrantRevoking, someone, id, Change{Reason: "asked to"}),
		NewChange(GrantRevoked, someone, id, Change{}))
	return l
}

func TestExport(t *testing.T) {
	l := lively(t)
	seq, head := l.Head()
	for _, after := range []uint64{0, 3, 5} {
		lines := exported(t, l, after)
		r, err := VerifyExport(t.Context(), strings.NewReader(strings.Join(lines, "")), Anchor{seq, head})
		if err != nil || r.Broken != nil {
			t.Fatalf("after %d: %+v, %v", after, r.Broken, err)
		}
		if r.Events != int(seq-after) || r.First != after+1 || r.Last != seq || r.Head != head || r.Anchors != 1 {
			t.Errorf("after %d: %+v", after, r)
		}
	}
	lines := exported(t, l, 4)
	r, err := VerifyExport(t.Context(), strings.NewReader(strings.Join(lines, "")), Anchor{2, head})
	if err != nil || r.Broken == nil || r.Broken.Problem != BrokenAnchor || !strings.Contains(r.Broken.Detail, "begins at event 5") {
		t.Errorf("an anchor before the export: %+v, %v", r.Broken, err)
	}
}

// TestExportIsNotForged edits an export in every way that a clumsy or a hostile
// hand could.
func TestExportIsNotForged(t *testing.T) {
	l := lively(t)
	good := exported(t, l, 0)
	anchor := Anchor{Hash: Hash{1}}
	anchor.Seq, anchor.Hash = l.Head()
	edit := func(fn func(lines []string) []string) string {
		return strings.Join(fn(append([]string{}, good...)), "")
	}
	for name, c := range map[string]struct {
		text string
		says string
	}{
		"a line is gone": {edit(func(l []string) []string { return append(l[:3], l[4:]...) }), "gap"},
		"two are swapped": {edit(func(l []string) []string {
			l[3], l[4] = l[4], l[3]
			return l
		}), "gap"},
		"one comes twice":    {edit(func(l []string) []string { return append(l[:4], l[3:]...) }), "gap"},
		"its end is gone":    {edit(func(l []string) []string { return l[:len(l)-1] }), "end is missing"},
		"its head is gone":   {edit(func(l []string) []string { return l[1:] }), "first line"},
		"it is empty":        {"", "empty"},
		"something follows":  {edit(func(l []string) []string { return append(l, "\n{}\n") }), "follows its end"},
		"it is another file": {"{\"format\":\"x\"}\n", "first line"},
		"of a newer version": {strings.Replace(edit(func(l []string) []string { return l }), `"version":1`, `"version":2`, 1), "its version is 2"},
		"the readable part lies": {edit(func(l []string) []string {
			l[5] = strings.Replace(l[5], "asked to", "so there", 1)
			return l
		}), "not what its record says"},
		"a field is there twice": {edit(func(l []string) []string {
			l[5] = strings.Replace(l[5], `{"seq"`, `{"type":"grant.active","seq"`, 1)
			return l
		}), "not what its record says"},
		"its hash is another": {edit(func(l []string) []string {
			l[5] = strings.Replace(l[5], `"hash":"`+l[5][strings.Index(l[5], `"hash":"`)+8:][:4], `"hash":"0000`, 1)
			return l
		}), "not what its record says"},
		"the last are cut off, and the end made to fit": {edit(func(l []string) []string {
			var prev struct{ Hash Hash }
			if err := json.Unmarshal([]byte(l[4]), &prev); err != nil {
				t.Fatal(err)
			}
			return append(l[:5], fmt.Sprintf("{\"events\":4,\"last\":4,\"head\":%q}\n", prev.Hash))
		}), "the ledger ends at 4"}, // only the anchor tells
	} {
		r, err := VerifyExport(t.Context(), strings.NewReader(c.text), anchor)
		said := fmt.Sprint(err)
		if r.Broken != nil {
			said = r.Broken.Error()
		}
		if err == nil && r.Broken == nil || !strings.Contains(said, c.says) {
			t.Errorf("%s: %s, want %q", name, said, c.says)
		}
	}
	// Each byte of each line, changed: found, whatever it is.
	text := []byte(strings.Join(good, ""))
	for i := range text {
		changed := bytes.Clone(text)
		changed[i] ^= 0x01
		if r, err := VerifyExport(t.Context(), bytes.NewReader(changed), anchor); err == nil && r.Broken == nil {
			t.Errorf("byte %d can be changed: %s", i, changed[max(0, i-20):min(len(changed), i+20)])
		}
		if r, err := VerifyExport(t.Context(), bytes.NewReader(text[:i]), anchor); i < len(text)-1 && err == nil && r.Broken == nil {
			t.Errorf("it can be cut after %d of %d bytes", i, len(text))
		}
	}
}

// TestExporterWantsTheChain: what does not follow is not exported.
func TestExporterWantsTheChain(t *testing.T) {
	l := lively(t)
	p, err := l.Read(t.Context(), Reading{Records: true})
	if err != nil {
		t.Fatal(err)
	}
	x := NewExporter(&bytes.Buffer{})
	if _, err := x.End(); err == nil {
		t.Error("an export of nothing was made")
	}
	if err := x.Add(p.Records[1]); err != nil {
		t.Fatal(err)
	}
	var broken *ChainError
	if err := x.Add(p.Records[3]); !errors.As(err, &broken) || broken.Problem != BrokenGap {
		t.Errorf("an event was left out: %v", err)
	}
	if err := x.Add([]byte("nonsense")); !errors.As(err, &broken) || broken.Problem != BrokenUndecodable {
		t.Errorf("nonsense: %v", err)
	}
}

// TestVerifyFrom looks at what follows an anchor, and at nothing before.
func TestVerifyFrom(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "spoilt")
	l := open(t, dir, clock.NewFake())
	var events []Event
	for range 9 {
		e, err := l.Update(t.Context(), func(tx *Tx) error { return tx.Append(Event{Type: BrokerStarted, Actor: someone}) })
		if err != nil {
			t.Fatal(err)
		}
		events = append(events, e...)
	}
	at := func(seq uint64) Anchor { return Anchor{seq, events[seq-2].Hash} }
	r, err := VerifyFrom(t.Context(), dir, at(5), at(8))
	if err != nil || r.Broken != nil || r.First != 5 || r.Last != 10 || r.Events != 6 || r.Anchors != 2 {
		t.Errorf("%+v, %v", r, err)
	}
	db, err := sql.Open("sqlite", filepath.Join(dir, fileName))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	spoil := func(seq int) {
		if _, err := db.ExecContext(t.Context(), "UPDATE events SET hash = zeroblob(32) WHERE seq = ?", seq); err != nil {
			t.Fatal(err)
		}
	}
	spoil(3)
	if r, err := VerifyFrom(t.Context(), dir, at(5)); err != nil || r.Broken != nil {
		t.Errorf("what is before the anchor counts: %+v, %v", r.Broken, err)
	}
	if r, err := Verify(t.Context(), dir, at(5)); err != nil || r.Broken == nil || r.Broken.Seq != 3 {
		t.Errorf("the whole: %+v, %v", r.Broken, err)
	}
	for name, c := range map[string]struct {
		from    Anchor
		problem string
	}{
		"another hash": {Anchor{5, Hash{1}}, BrokenAnchor}, "beyond the end": {Anchor{11, Hash{1}}, BrokenAnchor},
	} {
		if r, err := VerifyFrom(t.Context(), dir, c.from); err != nil || r.Broken == nil || r.Broken.Problem != c.problem || r.Broken.Seq != c.from.Seq {
			t.Errorf("%s: %+v, %v", name, r.Broken, err)
		}
	}
	spoil(8)
	if r, err := VerifyFrom(t.Context(), dir, at(5)); err != nil || r.Broken == nil || r.Broken.Seq != 8 || r.Broken.Problem != BrokenHash {
		t.Errorf("what is behind the anchor: %+v, %v", r.Broken, err)
	}
}

func TestParseAnchor(t *testing.T) {
	a := Anchor{12, Hash{0xab}}
	if got, err := ParseAnchor(a.String()); err != nil || got != a {
		t.Errorf("%v, %v", got, err)
	}
	for _, s := range []string{"", "12", ":", "0:" + a.Hash.String(), "-1:" + a.Hash.String(), "12:abcd", "12:" + a.Hash.String() + "00", "x:" + a.Hash.String()} {
		if got, err := ParseAnchor(s); err == nil {
			t.Errorf("%q is %v", s, got)
		}
	}
}
