package cli_test

import (
	"context"
	"slices"
	"strings"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
)

func (f *fake) Events(_ context.Context, q api.EventQuery) (out api.EventList, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var vm, grant uuid.UUID
	if q.VM != "" {
		v, err := f.vm(q.VM)
		if err != nil {
			return out, err
		}
		vm = v.ID
	}
	if q.Grant != "" {
		g, err := f.grant(q.Grant)
		if err != nil {
			return out, err
		}
		grant = g.ID
	}
	if q.After > uint64(len(f.events)) {
		return out, api.Errorf(api.CodeInvalid, "the cursor is beyond the end of the ledger")
	}
	out.Next = uint64(len(f.events))
	for _, e := range f.events {
		typed := len(q.Types) == 0 || slices.ContainsFunc(q.Types, func(t string) bool {
			return e.Type == t || strings.HasSuffix(t, ".") && strings.HasPrefix(e.Type, t)
		})
		if e.Seq <= q.After || !typed || vm != uuid.Nil && (e.VM == nil || *e.VM != vm) ||
			grant != uuid.Nil && (e.Grant == nil || *e.Grant != grant) ||
			q.Actor != "" && q.Actor != e.Actor.Kind || q.Decision != "" && q.Decision != api.DecisionOf(e.Type, e.Data) ||
			q.Since != nil && e.Time.Before(*q.Since) || q.Until != nil && !e.Time.Before(*q.Until) {
			continue
		}
		if q.Records {
			e.Record = f.records[e.Seq-1]
		}
		if out.Events = append(out.Events, e); q.Limit > 0 && len(out.Events) == q.Limit {
			out.Next, out.More = e.Seq, e.Seq < out.Next
			break
		}
	}
	return out, nil
}

func (f *fake) VerifyAudit(_ context.Context, q api.VerifyQuery) (api.AuditReport, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	r := api.AuditReport{Events: len(f.events), First: 1, Last: uint64(len(f.events)), Head: strings.Repeat("0", 64), Anchors: len(q.Anchors)}
	if q.FromAnchor {
		r.First, r.Events = q.Anchors[0].Seq, len(f.events)-int(q.Anchors[0].Seq)+1
	}
	if f.broken {
		r.Broken = &api.BrokenChain{Seq: 2, Problem: "hash mismatch"}
	}
	return r, nil
}

func (f *fake) RotateAudit(context.Context, api.Caller) (api.Rotation, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.broken {
		return api.Rotation{}, api.Errorf(api.CodeConflict, "nothing was recorded since the audit was rotated")
	}
	last := uint64(len(f.events))
	return api.Rotation{
		Archive: api.Archive{Name: "ledger-1-9-00000000.db", First: 1, Last: last}, Path: "/state/archive/ledger-1-9-00000000.db",
		Bytes: 4096, First: last + 1, Grants: 2, BlockedSeconds: 0.01,
	}, nil
}
