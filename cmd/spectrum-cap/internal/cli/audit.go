package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/google/uuid"
	"github.com/spf13/cobra"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/capabilities"
)

// eventFlags select events.
type eventFlags struct {
	query        api.EventQuery
	since, until string
}

func (e *eventFlags) register(cmd *cobra.Command, a *app) {
	f := cmd.Flags()
	f.StringVar(&e.query.VM, "vm", "", "only about this `VM`")
	f.StringVar(&e.query.Grant, "grant", "", "only about this `grant`")
	f.StringSliceVar(&e.query.Types, "type", nil, `only these `+"`types`"+`; "grant." is all that begin with it`)
	f.StringVar(&e.since, "since", "", "only from this `time` on: 2h (ago), 2006-01-02 15:04, or RFC 3339")
	f.StringVar(&e.until, "until", "", "only before this `time`")
	f.Uint64Var(&e.query.After, "after", 0, "only after the event with this `number`")
	_ = cmd.RegisterFlagCompletionFunc("vm", a.completeVM)
	_ = cmd.RegisterFlagCompletionFunc("grant", a.completeGrant)
	_ = cmd.RegisterFlagCompletionFunc("type", cobra.FixedCompletions(typeWords(), cobra.ShellCompDirectiveNoFileComp))
	for _, name := range []string{"since", "until", "after"} {
		_ = cmd.RegisterFlagCompletionFunc(name, cobra.NoFileCompletions)
	}
}

// typeWords are what --type takes: every type, and the beginnings that they
// share.
func typeWords() []string {
	var words []string
	for _, t := range ledger.EventTypes() {
		topic, _, _ := strings.Cut(string(t), ".")
		words = append(words, topic+".", string(t))
	}
	slices.Sort(words)
	return slices.Compact(words)
}

func (e *eventFlags) read(a *app) (q api.EventQuery, err error) {
	q = e.query
	if q.Since, err = a.parseTime("--since", e.since); err != nil {
		return q, err
	}
	q.Until, err = a.parseTime("--until", e.until)
	return q, err
}

func (a *app) auditCommand() *cobra.Command {
	var (
		flags  eventFlags
		limit  uint
		follow bool
	)
	cmd := &cobra.Command{
		Use:   "audit",
		Short: "Read the audit: every request, decision, and what came of it",
		Long: `Read the audit: every request, decision, and what came of it. It is the broker's
ledger itself, each entry bound to the one before by a hash.

With -o json each entry is a line.`,
		Example: `  spectrum-cap audit --since 1h
  spectrum-cap audit --vm work/mail --type grant.denied
  spectrum-cap audit --grant 5f3a9c01 -o json
  spectrum-cap audit --follow`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, got []string) error {
			if len(got) > 0 {
				return usage("%s has no command %q", cmd.CommandPath(), got[0])
			}
			q, err := flags.read(a)
			if err != nil {
				return err
			}
			return a.readAudit(cmd.Context(), q, int(limit), follow) //nolint:gosec // a flag
		},
	}
	flags.register(cmd, a)
	cmd.Flags().UintVar(&limit, "limit", 0, "at most so many")
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with what happens next, until interrupted")
	cmd.AddCommand(a.auditVerifyCommand())
	return cmd
}

// pageSize is the most that one call is asked for; 0 is the broker's choice.
const pageSize = 1000

// readAudit prints pages until there is no more.
func (a *app) readAudit(ctx context.Context, q api.EventQuery, limit int, follow bool) error {
	a.eventHead()
	for left := limit; ; {
		q.Limit = min(left, pageSize)
		page, err := a.broker().Audit(ctx, q)
		if err != nil {
			return err
		}
		for _, e := range page.Events {
			if err := a.printEvent(ctx, e); err != nil {
				return err
			}
			left--
		}
		if page.Next > q.After {
			q.After = page.Next
		}
		if limit > 0 && left <= 0 {
			return nil
		}
		if !page.More {
			break
		}
	}
	if !follow {
		return nil
	}
	q.Limit = 0
	return a.follow(ctx, q)
}

func (a *app) eventsCommand() *cobra.Command {
	var (
		flags  eventFlags
		follow bool
	)
	cmd := &cobra.Command{
		Use:   "events",
		Short: "Stream events, for programs that react to them",
		Long: `Stream events, for programs that react to them. Each has a number; --after goes
on behind it. A reader that is too slow is cut off and can go on in this way.`,
		Example: `  spectrum-cap events --follow -o json
  spectrum-cap events --after 1200 --follow --type grant.`,
		Args: args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			q, err := flags.read(a)
			if err != nil {
				return err
			}
			if follow {
				a.eventHead()
				return a.follow(cmd.Context(), q)
			}
			return a.readAudit(cmd.Context(), q, 0, false)
		},
	}
	flags.register(cmd, a)
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with what happens next, until interrupted")
	return cmd
}

// follow prints events until it is interrupted.
func (a *app) follow(ctx context.Context, q api.EventQuery) error {
	last := q.After
	for e, err := range a.broker().Events(ctx, q, true) {
		if err != nil {
			if ctx.Err() != nil {
				return nil // an interrupt is how following ends
			}
			return fmt.Errorf("%w (go on with --after %d)", err, last)
		}
		if err := a.printEvent(ctx, e); err != nil {
			return err
		}
		last = e.Seq
	}
	if ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("%w: the broker ended the stream (go on with --after %d)", api.ErrUnreachable, last)
}

const eventLine = "%-7v %-19s %-16s %-12s %-10s %-10s %s"

func (a *app) eventHead() {
	if a.output == "table" {
		_, _ = fmt.Fprintf(a.host.Stdout, eventLine+"\n", "SEQ", "TIME", "TYPE", "ACTOR", "VM", "GRANT", "DETAIL")
	}
}

func (a *app) printEvent(ctx context.Context, e api.Event) error {
	return a.printOne(e, func() string {
		named := strings.HasPrefix(e.Type, "name.")
		if named {
			a.names = nil
		}
		name := func(partition uuid.UUID) string {
			if named {
				return a.idText(&partition) // what it is called is the detail
			}
			return a.partitionName(ctx, partition)
		}
		detail := a.eventDetail(e.Data, name)
		if e.Partition != nil && e.VM == nil && e.Grant == nil {
			detail = strings.TrimSuffix("partition "+name(*e.Partition)+": "+detail, ": ")
		}
		return plain(strings.TrimRight(fmt.Sprintf(eventLine, e.Seq, stamp(e.Time), e.Type, actorText(e.Actor),
			a.idText(e.VM), a.idText(e.Grant), detail), " "))
	})
}

// partitionName is what a partition is called now, or its digits.
func (a *app) partitionName(ctx context.Context, partition uuid.UUID) string {
	if a.full {
		return partition.String()
	}
	if a.names == nil {
		a.names = map[uuid.UUID]string{}
		names, err := a.broker().ListNames(ctx)
		if err == nil {
			for _, n := range names {
				a.names[n.Partition] = n.Name
			}
		}
	}
	return orElse(a.names[partition], a.idText(&partition))
}

func (a *app) idText(id *uuid.UUID) string {
	switch {
	case id == nil:
		return "-"
	case a.full:
		return id.String()
	}
	return id.String()[:8]
}

func actorText(by api.Actor) string {
	switch {
	case by.UID != nil:
		return fmt.Sprintf("uid %d", *by.UID)
	case by.VM != nil:
		return "vm " + by.VM.String()[:8]
	}
	return by.Kind
}

// eventDetail is what people look for first in an event's data, whose shape
// differs by type; all of it is in the JSON.
func (a *app) eventDetail(data json.RawMessage, name func(partition uuid.UUID) string) string {
	var d struct {
		Capability json.RawMessage `json:"capability"`
		Spelling   string          `json:"spelling"`
		Label      string          `json:"label"`
		Name       string          `json:"name"`
		Alias      string          `json:"alias"`
		Reason     string          `json:"reason"`
		Revision   string          `json:"revision"`
		Engine     string          `json:"engine"`
		Instance   string          `json:"instance"`
		Wall       string          `json:"wall"`
		Error      string          `json:"error"`
		Version    string          `json:"version"`
		PID        json.Number     `json:"pid"`
		Epoch      json.Number     `json:"epoch"`
		Deadline   struct {
			Wall string `json:"wall"`
		} `json:"deadline"`
		Decision struct {
			Outcome string `json:"outcome"`
			Summary string `json:"summary"`
		} `json:"decision"`
	}
	if len(data) == 0 {
		return ""
	}
	if err := json.Unmarshal(data, &d); err != nil {
		return string(data)
	}
	if !a.full && len(d.Revision) > shownRevision {
		d.Revision = d.Revision[:shownRevision]
	}
	if d.Engine == hostEngine {
		d.Engine = "the host"
	} else {
		d.Engine = "" // the event is of its partition
	}
	var parts []string
	for _, p := range []string{
		orElse(d.Spelling, capabilityText(d.Capability, name)), d.Label, d.Name, d.Alias, d.Reason,
		orElse(d.Decision.Summary, d.Decision.Outcome), d.Engine, d.Error, named("revision", d.Revision),
		named("run", d.Instance), named("until", d.Deadline.Wall), d.Wall, named("version", d.Version), named("pid", d.PID.String()), named("epoch", d.Epoch.String()),
	} {
		if p != "" && !slices.Contains(parts, p) {
			parts = append(parts, p)
		}
	}
	if len(parts) == 0 {
		return string(data)
	}
	return strings.Join(parts, "; ")
}

// named is "what value", or "" where there is no value.
func named(what, value string) string {
	if value == "" {
		return ""
	}
	return what + " " + value
}

// capabilityText spells a capability from its JSON; one of a kind that is not
// known here, as far as its resource goes.
func capabilityText(raw json.RawMessage, name func(partition uuid.UUID) string) string {
	var spelt string
	if json.Unmarshal(raw, &spelt) == nil {
		return spelt
	}
	var c api.Capability
	if json.Unmarshal(raw, &c) != nil || c.Kind == "" {
		return ""
	}
	var file struct {
		Partition uuid.UUID `json:"partition"`
		Path      string    `json:"path"`
	}
	if c.Kind == (capabilities.FS{}).Name() && json.Unmarshal(c.Resource, &file) == nil && file.Path != "" {
		mode := "ro"
		if slices.Contains(c.Rights, capabilities.RightWrite) {
			mode = "rw"
		}
		return fmt.Sprintf("%s:%s:%s:%s", c.Kind, mode, name(file.Partition), file.Path)
	}
	return fmt.Sprintf("%s %s %s", c.Kind, strings.Join(c.Rights, "+"), c.Resource)
}

func (a *app) auditVerifyCommand() *cobra.Command {
	var state string
	cmd := &cobra.Command{
		Use:   "verify",
		Short: "Verify that no entry of the audit was changed, added or removed",
		Long: `Verify that no entry of the audit was changed, added or removed since it was
written, and name the first broken link if one was. With --state it reads the
broker's state directory itself, and needs no broker.`,
		Example: `  spectrum-cap audit verify
  spectrum-cap audit verify --state /var/lib/spectrum-broker`,
		Args: args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			end := a.progress("verifying the chain")
			report, err := a.verify(cmd.Context(), state)
			end()
			if err != nil {
				return err
			}
			err = a.print(report, func(w io.Writer) {
				if report.Broken == nil {
					_, _ = fmt.Fprintf(w, "intact: %d events, head %s\n", report.Events, report.Head)
				}
			})
			if err != nil {
				return err
			}
			if b := report.Broken; b != nil {
				return &codedError{exitFailed, fmt.Sprintf("the audit is broken at event %d: %s", b.Seq, b.Problem)}
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&state, "state", "", "verify the ledger in this `directory`")
	_ = cmd.MarkFlagDirname("state")
	return cmd
}

func (a *app) verify(ctx context.Context, state string) (api.AuditReport, error) {
	if state == "" {
		return a.broker().VerifyAudit(ctx)
	}
	r, err := ledger.Verify(ctx, state)
	report := api.AuditReport{Events: r.Events, Head: r.Head.String()}
	broken := r.Broken
	if broken == nil && !errors.As(err, &broken) {
		return report, err
	}
	problem := broken.Problem
	if broken.Detail != "" {
		problem += ": " + broken.Detail
	}
	report.Broken = &api.BrokenChain{Seq: broken.Seq, Problem: problem}
	return report, nil
}
