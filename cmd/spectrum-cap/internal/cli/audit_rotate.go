package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/google/uuid"
	"github.com/spf13/cobra"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/ledger"
)

func (a *app) auditRotateCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "rotate",
		Short: "Put all entries of the audit into an archive",
		Long: `Put all entries of the audit into an archive, a file in the broker's state
directory, and go on with what is in force. Numbers and the chain go on: "audit
verify" goes through the archives that are there. Grants that have ended are no
longer shown by "show" and "list --all" afterwards; "audit --archive" reads them.

The archive can be moved elsewhere. The broker does not need it.`,
		Example: `  spectrum-cap audit rotate
  spectrum-cap audit rotate -o json`,
		Args: args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			end := a.progress("writing the archive")
			r, err := a.broker().RotateAudit(cmd.Context())
			end()
			if err != nil {
				return err
			}
			return a.print(r, func(w io.Writer) {
				_, _ = fmt.Fprintf(w, "archived: events %d to %d, in %s\n", r.Archive.First, r.Archive.Last, r.Path)
				_, _ = fmt.Fprintf(w, "carried over: %s in force\n", counted(r.Grants, "grant"))
			})
		},
	}
}

func counted(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// readArchive prints what an archive has.
func (a *app) readArchive(ctx context.Context, path string, q api.EventQuery, limit int) error {
	filter, err := archiveFilter(q)
	if err != nil {
		return err
	}
	archive, err := ledger.OpenArchive(ctx, path)
	if err != nil {
		return err
	}
	defer func() { _ = archive.Close() }()
	if q.After > archive.Last {
		return usage("--after %d: the archive ends at event %d", q.After, archive.Last)
	}
	a.eventHead()
	r := ledger.Reading{After: q.After, Filter: filter, Limit: pageSize}
	for left := limit; ; {
		if limit > 0 {
			r.Limit = min(left, pageSize)
		}
		page, err := archive.Read(ctx, r)
		if err != nil {
			return err
		}
		for _, e := range page.Events {
			shown, err := shownEvent(e)
			if err == nil {
				err = a.printEvent(ctx, shown)
			}
			if err != nil {
				return err
			}
			left--
		}
		if !page.More || limit > 0 && left <= 0 {
			return nil
		}
		r.After = page.Next
	}
}

// shownEvent is an event as the broker would answer it.
func shownEvent(e ledger.Event) (out api.Event, err error) {
	b, err := json.Marshal(e)
	if err == nil {
		err = json.Unmarshal(b, &out)
	}
	if err != nil {
		err = fmt.Errorf("cannot show event %d: %w", e.Seq, err)
	}
	return out, err
}

// archiveFilter is the filter of a query without a broker that knows names.
func archiveFilter(q api.EventQuery) (f ledger.EventFilter, err error) {
	if q.Since != nil {
		f.Since = *q.Since
	}
	if q.Until != nil {
		f.Until = *q.Until
	}
	if q.VM != "" {
		if f.VM, err = uuid.Parse(q.VM); err != nil {
			return f, usage("--vm %s: in an archive a VM is named by its whole UUID", q.VM)
		}
	}
	grant := strings.ToLower(q.Grant)
	if grant != "" && (len(grant) < 8 || strings.Trim(grant, "0123456789abcdef-") != "") {
		return f, usage("--grant %s: in an archive a grant is named by its UUID, or its first 8 digits or more", q.Grant)
	}
	for _, w := range q.Types {
		before := len(f.Types)
		for _, t := range ledger.EventTypes() {
			if string(t) == w || strings.HasSuffix(w, ".") && strings.HasPrefix(string(t), w) {
				f.Types = append(f.Types, t)
			}
		}
		if len(f.Types) == before {
			return f, usage("--type %s: there is no such type of event", w)
		}
	}
	if f.Actor, err = archiveActor(q.Actor); err != nil {
		return f, err
	}
	f.Also = func(e ledger.Event) bool {
		return (grant == "" || e.Grant != uuid.Nil && strings.HasPrefix(e.Grant.String(), grant)) &&
			(q.Decision == "" || api.DecisionOf(string(e.Type), e.Data) == q.Decision)
	}
	return f, nil
}

func archiveActor(spec string) (f ledger.ActorFilter, err error) {
	what, value, qualified := strings.Cut(spec, ":")
	switch {
	case spec == "":
		return f, nil
	case !qualified && slices.Contains(ledger.ActorKinds(), spec):
		f.Kind = spec
		return f, nil
	case what == "uid":
		n, parsed := strconv.ParseUint(value, 10, 32)
		uid := uint32(n)
		f.Kind, f.UID, err = ledger.ActorPerson, &uid, parsed
	case what == "vm":
		f.Kind = ledger.ActorVM
		f.VM, err = uuid.Parse(value)
	default:
		err = errors.New("no actor")
	}
	if err != nil {
		return f, usage("--actor %s: in an archive it is one of %s, or uid:NUMBER, or vm:UUID", spec, strings.Join(ledger.ActorKinds(), ", "))
	}
	return f, nil
}
