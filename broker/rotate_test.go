package broker

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/ledger"
)

// TestRotateAudit is of a broker whose audit is rotated while a grant is in force
// and another has ended: the one goes on, the other is said to be in the archive.
func TestRotateAudit(t *testing.T) {
	g := newGranting(t, allowsAll, allowsAll)
	kept, over := g.granted(mail1, "/a"), g.granted(mail1, "/b")
	if _, err := g.revoke(t.Context(), brokerActor, only(over.ID), "enough", true); err != nil {
		t.Fatal(err)
	}
	person := api.Caller{Kind: api.CallerPerson, UID: 1000}
	r, err := g.RotateAudit(t.Context(), person)
	if err != nil || r.Grants != 1 || r.First != r.Archive.Last+1 || r.Path != filepath.Join(g.o.StateDir, "archive", r.Archive.Name) {
		t.Fatalf("%+v, %v", r, err)
	}
	if info, err := os.Stat(r.Path); err != nil || info.Size() != r.Bytes {
		t.Errorf("%v, %v; want %d bytes", info, err, r.Bytes)
	}
	if _, err := g.RotateAudit(t.Context(), person); api.CodeOf(err) != api.CodeConflict || !strings.Contains(err.Error(), "nothing was recorded") {
		t.Errorf("a rotation of nothing: %v", err)
	}
	if shown, err := g.ShowGrant(t.Context(), kept.ID.String()); err != nil || shown.State != api.GrantActive {
		t.Errorf("what is in force is shown as %+v, %v", shown, err)
	}
	for _, ref := range []string{over.ID.String(), over.ID.String()[:8]} {
		_, err := g.ShowGrant(t.Context(), ref)
		if api.CodeOf(err) != api.CodeNotFound || !strings.Contains(err.Error(), "spectrum-cap audit --archive "+r.Path+" --grant "+ref) {
			t.Errorf("what has ended is shown as %v", err)
		}
	}
	if _, err := g.ShowGrant(t.Context(), "dddddddd"); api.CodeOf(err) != api.CodeNotFound || !strings.Contains(err.Error(), "there is no grant") {
		t.Errorf("what never was is shown as %v", err)
	}
	// Who is on record as having done it.
	list, err := g.Events(t.Context(), api.EventQuery{Types: []string{"ledger.rotated"}, Actor: "uid:1000", Limit: 10})
	if err != nil || len(list.Events) != 2 || list.Events[0].Type != api.GapType || list.Events[1].Type != string(ledger.LedgerRotated) {
		t.Errorf("on record is %+v, %v", list.Events, err)
	}
	var gap api.Gap
	if err := json.Unmarshal(list.Events[0].Data, &gap); err != nil || gap.First != 1 || gap.Last != r.Archive.Last ||
		!strings.Contains(gap.Reason, "they are in archive/"+r.Archive.Name) || !slices.Equal(gap.Archives, []api.Archive{r.Archive}) {
		t.Errorf("the gap is %+v, %v", gap, err)
	}
	// The grant that was carried can be withdrawn, used and asked for as before.
	if _, err := g.revoke(t.Context(), brokerActor, only(kept.ID), "enough", true); err != nil || g.things.has(kept.ID) {
		t.Errorf("it cannot be revoked: %v", err)
	}
}

// A revocation that is waited for while the audit is rotated is seen to end, though
// what ended is not in the ledger any more.
func TestAwaitOverARotation(t *testing.T) {
	g := newGranting(t, allowsAll, allowsAll)
	made := g.granted(mail1, "/a")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	waiting := make(chan error, 1)
	go func() {
		_, err := g.await(ctx, made.ID, func(x ledger.Grant) bool { return false })
		waiting <- err
	}()
	if _, err := g.revoke(ctx, brokerActor, only(made.ID), "enough", true); err != nil {
		t.Fatal(err)
	}
	if _, err := g.rotate(ctx, brokerActor); err != nil {
		t.Fatal(err)
	}
	if err := <-waiting; err != nil {
		t.Errorf("it was waited for without end: %v", err)
	}
}

// TestRotateByItself rotates at the number of events that was asked for.
func TestRotateByItself(t *testing.T) {
	a := newAuditing(t)
	a.o.RotateAuditAt = 1000
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		a.keepAudit(ctx)
	}()
	a.record(998) // with the first event one less
	wake := a.ledger.Subscribe(ctx)
	a.record(1)
	if s := a.ledger.Segment(); s.First != 1 || s.Recorded() != 999 {
		t.Fatalf("it was rotated early: %+v", s)
	}
	a.record(2)
	for end := time.After(20 * time.Second); a.ledger.Segment().First == 1; {
		select {
		case <-wake:
		case <-end:
			t.Fatal("it was not rotated")
		}
	}
	cancel()
	<-done
	r, err := a.client.VerifyAudit(t.Context(), api.VerifyQuery{})
	if err != nil || r.Broken != nil || r.First != 1 || len(r.Archives) != 1 || r.Archives[0].Missing {
		t.Errorf("verified is %+v, %v", r, err)
	}
}

// TestFollowOverARotation has a follower with an old cursor, and one that is up to
// date: the first is told of the gap, the second sees none.
func TestFollowOverARotation(t *testing.T) {
	a := newAuditing(t)
	a.record(50)
	collect := func(after, until uint64) (seqs []uint64, gaps []api.Event) {
		t.Helper()
		for e, err := range a.client.Events(t.Context(), api.EventQuery{After: after}, true) {
			if err != nil {
				t.Fatal(err)
			}
			if e.Type == api.GapType {
				gaps = append(gaps, e)
			} else {
				seqs = append(seqs, e.Seq)
			}
			if e.Seq == until {
				return seqs, gaps
			}
		}
		t.Fatal("the stream ended")
		return nil, nil
	}
	r, err := a.client.RotateAudit(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	a.record(5)
	head, _ := a.ledger.Head()
	seqs, gaps := collect(20, head)
	if len(gaps) != 1 || gaps[0].Seq != r.Archive.Last || seqs[0] != r.First || len(seqs) != int(head-r.Archive.Last) {
		t.Errorf("an old cursor gets %v and %+v", seqs, gaps)
	}
	var gap api.Gap
	if err := json.Unmarshal(gaps[0].Data, &gap); err != nil || gap.First != 21 || gap.Last != r.Archive.Last {
		t.Errorf("the gap is %+v, %v", gap, err)
	}
	if seqs, gaps = collect(r.Archive.Last, head); len(gaps) != 0 || seqs[0] != r.First {
		t.Errorf("a cursor at the end of the archive gets %v and %+v", seqs, gaps)
	}
	// The cursor that the gap gives goes on without another.
	page, err := a.client.Audit(t.Context(), api.EventQuery{After: gap.Last, Limit: 1})
	if err != nil || page.Events[0].Seq != r.First {
		t.Errorf("%+v, %v", page, err)
	}
}
