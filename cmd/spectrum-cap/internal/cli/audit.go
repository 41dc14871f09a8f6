package cli

import (
	"context"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/ledger"
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
	f.StringVar(&e.query.Actor, "actor", "", "only what this `actor` caused: "+strings.Join(ledger.ActorKinds(), ", ")+", uid:1000, or vm:work/mail")
	f.StringVar(&e.query.Decision, "decision", "", "only requests with this `outcome`: "+strings.Join(api.Decisions, ", "))
	_ = cmd.RegisterFlagCompletionFunc("vm", a.completeVM)
	_ = cmd.RegisterFlagCompletionFunc("grant", a.completeGrant)
	_ = cmd.RegisterFlagCompletionFunc("type", cobra.FixedCompletions(typeWords(), cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("actor", cobra.FixedCompletions(append(ledger.ActorKinds(), "uid:", "vm:"), cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("decision", cobra.FixedCompletions(api.Decisions, cobra.ShellCompDirectiveNoFileComp))
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
	if q.Decision != "" && !slices.Contains(api.Decisions, q.Decision) {
		return q, usage("--decision %s: it is one of %s", q.Decision, strings.Join(api.Decisions, ", "))
	}
	if q.Since, err = a.parseTime("--since", e.since); err != nil {
		return q, err
	}
	q.Until, err = a.parseTime("--until", e.until)
	return q, err
}

func (a *app) auditCommand() *cobra.Command {
	var (
		flags   eventFlags
		limit   uint
		follow  followFlags
		archive string
	)
	cmd := &cobra.Command{
		Use:   "audit",
		Short: "Read the audit: every request, decision, and what came of it",
		Long: `Read the audit: every request, decision, and what came of it. It is the broker's
ledger itself, each entry bound to the one before by a hash.

What selects entries is looked at by the broker. --decision selects requests by
the outcome of the decision on record: "error" where a policy could not decide,
"deny" also where a request was refused before policy was asked.

After a rotation a row "ledger.gap" stands for what is in archives, and --archive
reads one of them, without the broker; VMs are named by their UUIDs there.

With -o json each entry is a line.`,
		Example: `  spectrum-cap audit --since 1h
  spectrum-cap audit --vm work/mail --type grant.denied
  spectrum-cap audit --grant 5f3a9c01 -o json
  spectrum-cap audit --decision deny --actor vm:work/mail --since 2026-01-01
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
			if archive != "" {
				if follow.on {
					return usage("nothing is added to an archive: --follow does not go with --archive")
				}
				return a.readArchive(cmd.Context(), archive, q, int(limit)) //nolint:gosec // a flag
			}
			return a.readAudit(cmd.Context(), q, int(limit), follow) //nolint:gosec // a flag
		},
	}
	flags.register(cmd, a)
	cmd.Flags().UintVar(&limit, "limit", 0, "at most so many")
	cmd.Flags().StringVar(&archive, "archive", "", "read this `file`, which a rotation made, and not the broker's ledger")
	follow.register(cmd)
	cmd.AddCommand(a.auditVerifyCommand(), a.auditExportCommand(), a.auditRotateCommand())
	return cmd
}

// pageSize is the most that one call is asked for; 0 is the broker's choice.
const pageSize = 1000

// readAudit prints pages until there is no more.
func (a *app) readAudit(ctx context.Context, q api.EventQuery, limit int, follow followFlags) error {
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
			if e.Type != api.GapType {
				left--
			}
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
	if !follow.on {
		return nil
	}
	q.Limit = 0
	return a.follow(ctx, q, follow)
}
