package broker

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/ledger"
)

// Bounds of one page of events: what it looks at, and what it holds. A filter
// that hardly anything matches, or events that hold much, end a page early.
const (
	maxScanned   = 20_000
	maxPageBytes = 4 << 20
)

// Events implements api.Service.
func (b *Broker) Events(ctx context.Context, q api.EventQuery) (api.EventList, error) {
	f, err := b.eventFilter(q)
	if err != nil {
		return api.EventList{}, err
	}
	page, err := b.ledger.Read(ctx, ledger.Reading{
		After: q.After, Filter: f, Limit: max(q.Limit, 1), Scan: maxScanned, Bytes: maxPageBytes, Records: q.Records,
	})
	if errors.Is(err, ledger.ErrBeyondHead) {
		return api.EventList{}, api.Errorf(api.CodeInvalid,
			"%w: it was got from another ledger, or from this one before an older backup of it was restored; begin again without a cursor", err)
	}
	if err != nil {
		return api.EventList{}, err
	}
	out := api.EventList{Next: page.Next, More: page.More}
	if page.Gap != nil {
		out.Events = append(out.Events, gapEvent(page.Gap))
	}
	for i, e := range page.Events {
		o := apiEvent(e)
		if q.Records {
			o.Record = page.Records[i]
		}
		out.Events = append(out.Events, o)
	}
	return out, nil
}

// gapEvent stands for the events that a reader asked for and that are in archives.
func gapEvent(g *ledger.Gap) api.Event {
	data := api.Gap{First: g.First, Last: g.Last, Archives: apiArchives(g.Archives)}
	var names []string
	for _, a := range g.Archives {
		names = append(names, ledger.ArchiveDir+"/"+a.Name)
	}
	data.Reason = fmt.Sprintf("events %d to %d are not in the ledger any more", g.First, g.Last)
	if len(names) > 0 {
		data.Reason += "; they are in " + strings.Join(names, ", ")
	}
	switch {
	case len(names) == 0:
		data.Reason += ", and their archive is not there"
	case g.Missing:
		data.Reason += ", and some are in archives that are not there"
	}
	return api.Event{Seq: g.Last, Time: g.Rotated, Type: api.GapType, Actor: api.Actor{Kind: ledger.ActorBroker}, Data: ledger.JSON(data)}
}

func apiArchives(all []ledger.ArchiveName) []api.Archive {
	out := []api.Archive{}
	for _, a := range all {
		out = append(out, api.Archive{Name: a.Name, First: a.First, Last: a.Last})
	}
	return out
}

// RotateAudit implements api.Service.
func (b *Broker) RotateAudit(ctx context.Context, by api.Caller) (api.Rotation, error) {
	// What was begun is finished, whether somebody still waits for it or not.
	r, err := b.rotate(context.WithoutCancel(ctx), actorOf(by))
	switch {
	case errors.Is(err, ledger.ErrRotating), errors.Is(err, ledger.ErrNothingToRotate):
		return api.Rotation{}, api.Errorf(api.CodeConflict, "%w", err)
	case errors.Is(err, ledger.ErrUnknownOutcome):
		return api.Rotation{}, unrecorded("whether the audit was rotated is known when it was read again", err)
	case err != nil:
		return api.Rotation{}, api.Errorf(api.CodeUnavailable, "the audit was not rotated, and is as it was: %v", err).WithCause(err)
	}
	return api.Rotation{
		Archive: api.Archive{Name: r.Archive.Name, First: r.Archive.First, Last: r.Archive.Last},
		Path:    filepath.Join(b.o.StateDir, ledger.ArchiveDir, r.Archive.Name), Bytes: r.Bytes,
		First: r.Archive.Last + 1, Grants: r.Grants, BlockedSeconds: r.Blocked.Seconds(),
	}, nil
}

func (b *Broker) rotate(ctx context.Context, by ledger.Actor) (ledger.Rotation, error) {
	r, err := b.ledger.Rotate(ctx, by)
	if err == nil {
		b.log.Info("the audit was rotated", "archive", r.Archive.Name, "events", r.Archive.Last-r.Archive.First+1, "grants", r.Grants, "blocked", r.Blocked)
	}
	return r, err
}

// noGrant is the error for a grant that is not in the ledger: it may be in an
// archive.
func (b *Broker) noGrant(ref string) error {
	if b.ledger.Segment().Archive.Archive != "" {
		a, found, err := ledger.Archived(b.ctx, b.o.StateDir, ref)
		if err != nil {
			b.log.Warn("cannot look for a grant in the archives", "err", err)
		}
		if found {
			return api.Errorf(api.CodeNotFound, "grant %s ended long ago and is in an archive; `spectrum-cap audit --archive %s --grant %s` shows what is on record of it",
				ref, filepath.Join(b.o.StateDir, ledger.ArchiveDir, a.Name), ref)
		}
	}
	return api.Errorf(api.CodeNotFound, "there is no grant %q (an id, or its first %d digits or more)", ref, minPrefix)
}

// keepAudit rotates the audit when as many events were recorded as it is to hold.
func (b *Broker) keepAudit(ctx context.Context) {
	wake := b.ledger.Subscribe(ctx)
	for {
		var again <-chan time.Time
		if seg := b.ledger.Segment(); seg.Recorded() >= uint64(b.o.RotateAuditAt) {
			if _, err := b.rotate(ctx, brokerActor); err != nil && ctx.Err() == nil && !errors.Is(err, ledger.ErrRotating) {
				b.log.Error("cannot rotate the audit; trying again in a minute", "err", err)
				again = time.After(time.Minute)
			}
		}
		for waiting := true; waiting; {
			select {
			case <-ctx.Done():
				return
			case <-again:
				waiting = false
			case <-wake:
				waiting = again != nil
			}
		}
	}
}

// eventFilter resolves what a query names.
func (b *Broker) eventFilter(q api.EventQuery) (f ledger.EventFilter, err error) {
	f.Since, f.Until = timeOr(q.Since), timeOr(q.Until)
	if f.VM, err = b.auditedVM(q.VM); err != nil {
		return f, err
	}
	if f.Grant, err = b.auditedGrant(q.Grant); err != nil {
		return f, err
	}
	if f.Types, err = eventTypes(q.Types); err != nil {
		return f, err
	}
	if f.Actor, err = b.actorFilter(q.Actor); err != nil {
		return f, err
	}
	if q.Decision != "" {
		f.Also = func(e ledger.Event) bool { return api.DecisionOf(string(e.Type), e.Data) == q.Decision }
		decided := []ledger.EventType{ledger.GrantRequested, ledger.GrantDenied}
		f.Types = slices.DeleteFunc(decided, func(t ledger.EventType) bool { return len(f.Types) > 0 && !slices.Contains(f.Types, t) })
		if len(f.Types) == 0 {
			return f, api.Errorf(api.CodeInvalid, "only grant.requested and grant.denied record a decision, and type asks for neither")
		}
	}
	return f, nil
}

// auditedVM resolves a VM. One whose definition is gone still has a past: its
// whole UUID is taken as it is.
func (b *Broker) auditedVM(ref string) (uuid.UUID, error) {
	if ref == "" {
		return uuid.Nil, nil
	}
	id, err := b.resolveVM(ref)
	if whole, parsed := uuid.Parse(ref); api.CodeOf(err) == api.CodeNotFound && err != nil && parsed == nil && len(ref) == 36 {
		return whole, nil
	}
	return id, err
}

// auditedGrant resolves a grant, likewise.
func (b *Broker) auditedGrant(ref string) (uuid.UUID, error) {
	if ref == "" {
		return uuid.Nil, nil
	}
	if id, err := uuid.Parse(ref); err == nil && len(ref) == 36 {
		return id, nil
	}
	g, err := b.resolveGrant(ref)
	return g.ID, err
}

// eventTypes are the types that are named, exactly or by a prefix that ends in a
// dot.
func eventTypes(want []string) ([]ledger.EventType, error) {
	var out []ledger.EventType
	for _, w := range want {
		before := len(out)
		for _, t := range ledger.EventTypes() {
			if string(t) == w || strings.HasSuffix(w, ".") && strings.HasPrefix(string(t), w) {
				out = append(out, t)
			}
		}
		if len(out) == before {
			return nil, api.Errorf(api.CodeInvalid, "there is no type of event %q; a type is written as %q, or as %q for all that begin so", w, ledger.GrantDenied, "grant.")
		}
	}
	return out, nil
}

// actorFilter reads "person", "uid:1000" or "vm:work/mail".
func (b *Broker) actorFilter(spec string) (f ledger.ActorFilter, err error) {
	switch what, value, qualified := strings.Cut(spec, ":"); {
	case spec == "":
		return f, nil
	case !qualified && slices.Contains(ledger.ActorKinds(), spec):
		f.Kind = spec
		return f, nil
	case qualified && what == "uid":
		n, err := strconv.ParseUint(value, 10, 32)
		if err != nil {
			return f, api.Errorf(api.CodeInvalid, "%q is not the number of a user", value)
		}
		uid := uint32(n)
		f.Kind, f.UID = ledger.ActorPerson, &uid
		return f, nil
	case qualified && what == "vm" && value != "":
		f.Kind = ledger.ActorVM
		f.VM, err = b.auditedVM(value)
		return f, err
	}
	return f, api.Errorf(api.CodeInvalid, "%q is no actor: it is one of %s, or uid:NUMBER, or vm:VM", spec, strings.Join(ledger.ActorKinds(), ", "))
}

// EventsWake implements api.Service.
func (b *Broker) EventsWake(ctx context.Context) <-chan struct{} { return b.ledger.Subscribe(ctx) }

// VerifyAudit implements api.Service.
func (b *Broker) VerifyAudit(ctx context.Context, q api.VerifyQuery) (api.AuditReport, error) {
	anchors := make([]ledger.Anchor, len(q.Anchors))
	for i, a := range q.Anchors {
		anchors[i].Seq = a.Seq
		if err := anchors[i].Hash.UnmarshalText([]byte(a.Hash)); err != nil {
			return api.AuditReport{}, invalid(err)
		}
	}
	var r ledger.VerifyReport
	var err error
	if q.FromAnchor && len(anchors) > 0 {
		slices.SortFunc(anchors, func(x, y ledger.Anchor) int { return cmp.Compare(x.Seq, y.Seq) })
		r, err = ledger.VerifyFrom(ctx, b.o.StateDir, anchors[0], anchors[1:]...)
	} else {
		r, err = ledger.Verify(ctx, b.o.StateDir, anchors...)
	}
	if err != nil {
		return api.AuditReport{}, fmt.Errorf("cannot read the ledger: %w", err)
	}
	return auditReport(r), nil
}

// auditReport is a report of the ledger as it is shown.
func auditReport(r ledger.VerifyReport) api.AuditReport {
	out := api.AuditReport{Events: r.Events, First: r.First, Last: r.Last, Head: r.Head.String(), Anchors: r.Anchors}
	for _, a := range r.Archives {
		out.Archives = append(out.Archives, api.Archive{Name: a.Name, First: a.First, Last: a.Last, Missing: a.Missing})
	}
	if b := r.Broken; b != nil {
		out.Broken = &api.BrokenChain{Seq: b.Seq, Problem: strings.TrimSuffix(b.Problem+": "+b.Detail, ": ")}
	}
	return out
}
