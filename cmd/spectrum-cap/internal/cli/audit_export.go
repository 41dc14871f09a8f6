package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/ledger"
)

func (a *app) auditExportCommand() *cobra.Command {
	var (
		after uint64
		force bool
	)
	cmd := &cobra.Command{
		Use:   "export FILE",
		Short: "Write the audit to a file that can be verified anywhere",
		Long: `Write the audit to a file: one line of JSON for each entry, with its hash and the
record that the hash is of. The file is there whole, or not at all. Verify it with
"spectrum-cap audit verify --file FILE", on any machine.

An export is of all entries, or with --after of all that follow one, because an
entry that were left out would break the chain. To select entries use
"spectrum-cap audit -o json".`,
		Example: `  spectrum-cap audit export audit.ndjson
  spectrum-cap audit export --after 1200 since-monday.ndjson`,
		Args:              args(1, 1, "FILE"),
		ValidArgsFunction: cobra.FixedCompletions(nil, cobra.ShellCompDirectiveDefault),
		RunE: func(cmd *cobra.Command, got []string) error {
			end := a.progress("exporting the audit")
			report, err := a.export(cmd.Context(), got[0], after, force)
			end()
			if err != nil {
				return err
			}
			return a.print(report, func(w io.Writer) {
				_, _ = fmt.Fprintf(w, "exported: events %d to %d, head %s\n", report.First, report.Last, report.Head)
			})
		},
	}
	cmd.Flags().Uint64Var(&after, "after", 0, "only what follows the event with this `number`")
	cmd.Flags().BoolVar(&force, "force", false, "replace the file where it exists")
	_ = cmd.RegisterFlagCompletionFunc("after", cobra.NoFileCompletions)
	return cmd
}

// export writes the file beside its place, and moves it there when it is whole
// and on the disk.
func (a *app) export(ctx context.Context, path string, after uint64, force bool) (report api.AuditReport, err error) {
	if _, err := os.Lstat(path); err == nil && !force {
		return report, usage("%s exists already; --force replaces it", path)
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return report, fmt.Errorf("cannot write the export: %w", err)
	}
	defer func() {
		_ = f.Close()
		if err != nil {
			_ = os.Remove(f.Name())
		}
	}()
	r, err := a.exportTo(ctx, f, after)
	if err != nil {
		return report, err
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return report, fmt.Errorf("cannot write the export: %w", err)
	}
	if force {
		err = os.Rename(f.Name(), path)
	} else if err = os.Link(f.Name(), path); err == nil {
		// What appeared meanwhile is not replaced.
		err = os.Remove(f.Name())
	}
	if err == nil {
		err = syncDir(filepath.Dir(path))
	}
	if err != nil {
		return report, fmt.Errorf("cannot write the export: %w", err)
	}
	return auditReport(r), nil
}

func (a *app) exportTo(ctx context.Context, f *os.File, after uint64) (ledger.VerifyReport, error) {
	x := ledger.NewExporter(f)
	for q := (api.EventQuery{After: after, Limit: pageSize, Records: true}); ; {
		page, err := a.broker().Audit(ctx, q)
		if err != nil {
			return ledger.VerifyReport{}, err
		}
		for _, e := range page.Events {
			if e.Type == api.GapType {
				a.note("the export begins with event %d: %s", e.Seq+1, gapReason(e))
				continue
			}
			if err := x.Add(e.Record); err != nil {
				return ledger.VerifyReport{}, err
			}
		}
		if !page.More {
			return x.End()
		}
		q.After = page.Next
	}
}

// syncDir makes the names in a directory durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
