package cli

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/ledger"
)

func (a *app) auditVerifyCommand() *cobra.Command {
	var (
		from    source
		anchors []string
		begin   bool
	)
	cmd := &cobra.Command{
		Use:   "verify",
		Short: "Verify that no entry of the audit was changed, added or removed",
		Long: `Verify that no entry of the audit was changed, added or removed since it was
written, and name the first broken link if one was. With --state it reads the
broker's state directory itself, with --file an export or an archive, and needs no
broker. The ledger is verified together with its archives, as far back as they are
in the state directory.

The chain has no secret: whoever can write the ledger can make a whole new one, or
cut off its end. Such shows only against an anchor, the number and hash of an
entry that were noted elsewhere, such as the head that this command prints. With
--anchor the entry must be part of the chain. With --from-anchor only the anchor
and what follows it are verified.`,
		Example: `  spectrum-cap audit verify
  spectrum-cap audit verify --state /var/lib/spectrum-broker
  spectrum-cap audit verify --file audit.ndjson
  spectrum-cap audit verify --anchor 1200:9f2c6d3e… --from-anchor`,
		Args: args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			var known []ledger.Anchor
			for _, s := range anchors {
				one, err := ledger.ParseAnchor(s)
				if err != nil {
					return usage("--anchor %w", err)
				}
				known = append(known, one)
			}
			if from.state != "" && from.file != "" {
				return usage("--state and --file exclude each other")
			}
			if begin && len(known) == 0 {
				return usage("--from-anchor needs an --anchor to begin at")
			}
			slices.SortFunc(known, func(x, y ledger.Anchor) int { return cmp.Compare(x.Seq, y.Seq) })
			end := a.progress("verifying the chain")
			report, err := a.verify(cmd.Context(), from, known, begin)
			end()
			if err != nil {
				return err
			}
			return a.printReport(report)
		},
	}
	f := cmd.Flags()
	f.StringVar(&from.state, "state", "", "verify the ledger in this `directory`")
	f.StringVar(&from.file, "file", "", "verify this `file`, an export or an archive")
	f.StringSliceVar(&anchors, "anchor", nil, "`number:hash` of an entry that must be part of the chain; may be given several times")
	f.BoolVar(&begin, "from-anchor", false, "verify only from the first anchor on")
	_ = cmd.MarkFlagDirname("state")
	_ = cmd.RegisterFlagCompletionFunc("anchor", cobra.NoFileCompletions)
	return cmd
}

// source is where an audit is; empty: the broker has it.
type source struct{ state, file string }

func (a *app) printReport(report api.AuditReport) error {
	err := a.print(report, func(w io.Writer) {
		if report.Broken != nil {
			return
		}
		since := ""
		if report.First > 1 {
			since = fmt.Sprintf(" from event %d on", report.First)
		}
		_, _ = fmt.Fprintf(w, "intact: %d events%s, head %s\n", report.Events, since, report.Head)
		writeArchives(w, report.Archives)
		if report.Anchors > 0 {
			_, _ = fmt.Fprintf(w, "anchors that are part of it: %d\n", report.Anchors)
		}
		_, _ = fmt.Fprintf(w, "to be able to tell later that nothing was cut off, keep elsewhere: --anchor %d:%s\n", report.Last, report.Head)
	})
	if err != nil {
		return err
	}
	if b := report.Broken; b != nil {
		return &codedError{exitFailed, fmt.Sprintf("the audit is broken at event %d: %s", b.Seq, b.Problem)}
	}
	return nil
}

func writeArchives(w io.Writer, all []api.Archive) {
	for _, x := range all {
		if x.Missing {
			_, _ = fmt.Fprintf(w, "not verified: events %d to %d, as archive %s is not there\n", x.First, x.Last, x.Name)
		} else {
			_, _ = fmt.Fprintf(w, "with archive %s: events %d to %d\n", x.Name, x.First, x.Last)
		}
	}
}

func (a *app) verify(ctx context.Context, from source, anchors []ledger.Anchor, begin bool) (api.AuditReport, error) {
	if from == (source{}) {
		q := api.VerifyQuery{FromAnchor: begin}
		for _, k := range anchors {
			q.Anchors = append(q.Anchors, api.Anchor{Seq: k.Seq, Hash: k.Hash.String()})
		}
		return a.broker().VerifyAudit(ctx, q)
	}
	var r ledger.VerifyReport
	var err error
	switch {
	case from.file != "" && begin:
		return api.AuditReport{}, usage("a file is verified whole: --from-anchor does not go with --file")
	case from.file != "":
		var f *os.File
		if f, err = os.Open(from.file); err != nil {
			return api.AuditReport{}, fmt.Errorf("cannot read the export: %w", err)
		}
		defer func() { _ = f.Close() }()
		if isDatabase(f) {
			r, err = ledger.VerifyArchive(ctx, from.file, anchors...)
		} else {
			r, err = ledger.VerifyExport(ctx, f, anchors...)
		}
	case begin:
		r, err = ledger.VerifyFrom(ctx, from.state, anchors[0], anchors[1:]...)
	default:
		r, err = ledger.Verify(ctx, from.state, anchors...)
	}
	return auditReport(r), err
}

// isDatabase tells an archive from an export, and leaves f at its beginning.
func isDatabase(f io.ReadSeeker) bool {
	const magic = "SQLite format 3\x00"
	head := make([]byte, len(magic))
	_, err := io.ReadFull(f, head)
	_, back := f.Seek(0, io.SeekStart)
	return err == nil && back == nil && string(head) == magic
}

// auditReport is a report of the ledger as it is shown.
func auditReport(r ledger.VerifyReport) api.AuditReport {
	out := api.AuditReport{Events: r.Events, First: r.First, Last: r.Last, Head: r.Head.String(), Anchors: r.Anchors}
	for _, x := range r.Archives {
		out.Archives = append(out.Archives, api.Archive{Name: x.Name, First: x.First, Last: x.Last, Missing: x.Missing})
	}
	if b := r.Broken; b != nil {
		out.Broken = &api.BrokenChain{Seq: b.Seq, Problem: strings.TrimSuffix(b.Problem+": "+b.Detail, ": ")}
	}
	return out
}
