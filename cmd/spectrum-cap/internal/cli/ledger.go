package cli

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/google/uuid"
	"github.com/spf13/cobra"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/ledger"
)

// DefaultState is the broker's state directory unless it was told otherwise.
const DefaultState = "/var/lib/spectrum-broker"

func (a *app) ledgerCommand() *cobra.Command {
	cmd := group(&cobra.Command{
		Use:   "ledger",
		Short: "Verify, back up and restore the ledger's file",
		Long: `Verify, back up and restore the ledger's file: all that the broker knows, and
the audit. These commands read the broker's state directory themselves.`,
		Example: `  spectrum-cap ledger backup /mnt/backup/ledger-monday.db
  spectrum-cap ledger verify /mnt/backup/ledger-monday.db
  spectrum-cap ledger restore /mnt/backup/ledger-monday.db`,
	})
	cmd.AddCommand(a.ledgerVerifyCommand(), a.ledgerBackupCommand(), a.ledgerRestoreCommand())
	return cmd
}

// ledgerView is the answer of each of the commands; they differ in what they
// fill in.
type ledgerView struct {
	File     string    `json:"file"`
	Ledger   uuid.UUID `json:"ledger"`
	Epoch    uint64    `json:"epoch"`
	Events   int       `json:"events"`
	Seq      uint64    `json:"seq"`
	Head     string    `json:"head"`
	Bytes    int64     `json:"bytes,omitempty"`
	Key      string    `json:"key,omitempty"`
	Revoking *int      `json:"revoking,omitempty"`
	Replaced string    `json:"replaced,omitempty"`
	Broken   string    `json:"broken,omitempty"`
	// Archives are those that the events go through, the newest first.
	Archives []api.Archive `json:"archives,omitempty"`
}

func viewOf(file string, events int, m ledger.Mark) ledgerView {
	return ledgerView{File: file, Ledger: m.Ledger, Epoch: m.Epoch, Events: events, Seq: m.Seq, Head: m.Hash.String()}
}

func (v *ledgerView) text() string {
	return fmt.Sprintf("ledger %s, epoch %d: %d events, anchor %d:%s", v.Ledger, v.Epoch, v.Events, v.Seq, v.Head)
}

func (a *app) ledgerVerifyCommand() *cobra.Command {
	var state string
	var anchors []string
	cmd := &cobra.Command{
		Use:   "verify [FILE]",
		Short: "Verify the whole chain of the ledger, or of a backup",
		Long: `Verify the whole chain of the ledger in a state directory, beside a broker or
without one, or of a backup: that no event was changed, added or removed, and
that the state directory's own anchor is part of it. The ledger is verified with
its archives, as far back as they are there; a backup by itself.

An event written down elsewhere, NUMBER:HASH as this command and 'ledger backup'
print the newest, is looked for with --anchor: only that shows that the newest
events were cut off together with what the state directory knows of them.`,
		Example: `  spectrum-cap ledger verify
  spectrum-cap ledger verify --state /var/lib/spectrum-broker
  spectrum-cap ledger verify /mnt/backup/ledger-monday.db
  spectrum-cap ledger verify --anchor 812:9f5c0b2be6d0a0c4f3a1de0f7c6b5a49382716059f8e7d6c5b4a392817061524`,
		Args: args(0, 1, ""),
		RunE: func(cmd *cobra.Command, got []string) error {
			known := make([]ledger.Anchor, len(anchors))
			for i, text := range anchors {
				var err error
				if known[i], err = ledger.ParseAnchor(text); err != nil {
					return usage("--anchor: %w", err)
				}
			}
			file := state
			if len(got) == 1 {
				if cmd.Flags().Changed("state") {
					return usage("ledger verify takes either a FILE or --state")
				}
				file = got[0]
			}
			end := a.progress("verifying the chain")
			report, err := verifyLedger(cmd.Context(), file, len(got) == 1, known)
			end()
			if err != nil {
				return err
			}
			v := viewOf(file, report.Events, report.Mark())
			v.Archives = auditReport(report).Archives
			if report.Broken != nil {
				v.Broken = report.Broken.Error()
			}
			err = a.print(v, func(w io.Writer) {
				if report.Broken == nil {
					_, _ = fmt.Fprintln(w, "intact: "+v.text())
					writeArchives(w, v.Archives)
				}
			})
			if err != nil || report.Broken == nil {
				return err
			}
			return &codedError{exitFailed, v.Broken}
		},
	}
	stateFlag(cmd, &state, DefaultState, "verify the ledger in this `directory`")
	cmd.Flags().StringArrayVar(&anchors, "anchor", nil, "an `event` that must be in it, NUMBER:HASH; may be given several times")
	_ = cmd.RegisterFlagCompletionFunc("anchor", cobra.NoFileCompletions)
	return cmd
}

func verifyLedger(ctx context.Context, path string, file bool, known []ledger.Anchor) (ledger.VerifyReport, error) {
	if file {
		return ledger.VerifyFile(ctx, path, known...)
	}
	return ledger.Verify(ctx, path, known...)
}

func (a *app) ledgerBackupCommand() *cobra.Command {
	var state string
	cmd := &cobra.Command{
		Use:   "backup FILE",
		Short: "Write a backup of the ledger into a new file",
		Long: `Write a backup of the ledger, as it is at one moment, into a new file that only
its owner can read. The broker may run, and goes on. The file is there under its
name when it is whole, verified and durable; one that exists is not replaced.

It holds all that is in force and every event that is not in an archive, and no
private key: who reads it learns what was granted to whom, and can do nothing with
it. Archives of the audit are files that never change: copy them too.`,
		Example: `  spectrum-cap ledger backup /mnt/backup/ledger-$(date +%F).db
  spectrum-cap ledger backup --state /var/lib/spectrum-broker monday.db -o json`,
		Args: args(1, 1, "a file to write"),
		RunE: func(cmd *cobra.Command, got []string) error {
			end := a.progress("copying and verifying")
			r, err := ledger.Backup(cmd.Context(), state, got[0])
			end()
			if err != nil {
				return err
			}
			v := viewOf(r.File, r.Events, r.Mark)
			v.Bytes = r.Bytes
			return a.print(v, func(w io.Writer) {
				_, _ = fmt.Fprintf(w, "%s: %s\n", plain(r.File), v.text())
			})
		},
	}
	stateFlag(cmd, &state, DefaultState, "back up the ledger in this `directory`")
	return cmd
}

// stopFirst says what to do about a broker that is in the way.
func stopFirst(err error) error {
	if errors.Is(err, ledger.ErrLocked) {
		return fmt.Errorf("%w; stop the broker first", err)
	}
	return err
}

func (a *app) ledgerRestoreCommand() *cobra.Command {
	var state string
	cmd := &cobra.Command{
		Use:   "restore FILE",
		Short: "Put a backup in the ledger's place, with every grant in it revoked",
		Long: `Put a backup in the ledger's place, while no broker runs. Nothing that was
granted comes back: a new epoch begins with a new key, every grant that had not
ended is revoked, and no token of before is accepted. Names and the binding of
VMs to their partitions stay. When the broker starts again it takes away
whatever VMs still have.

The backup is verified first, and the database that was there is kept under
another name. FILE may be the state directory's own ledger.db, to go on with it
when its anchor is lost. A backup of another ledger goes into an empty directory
only.`,
		Example: `  spectrum-cap ledger restore /mnt/backup/ledger-monday.db
  spectrum-cap ledger restore --state /var/lib/spectrum-broker monday.db`,
		Args: args(1, 1, "a backup"),
		RunE: func(cmd *cobra.Command, got []string) error {
			end := a.progress("verifying and restoring")
			r, err := a.offline(state).Restore(cmd.Context(), got[0])
			end()
			if err != nil {
				return stopFirst(err)
			}
			v := viewOf(got[0], r.Events, r.Mark)
			v.Key, v.Revoking, v.Replaced = r.KID, &r.Ended, r.Replaced
			return a.print(v, func(w io.Writer) {
				_, _ = fmt.Fprintf(w, "restored %s; %d grants end when the broker starts, and key %s signs\n", v.text(), r.Ended, r.KID)
				if r.Replaced != "" {
					_, _ = fmt.Fprintf(w, "what was there is %s\n", plain(r.Replaced))
				}
			})
		},
	}
	stateFlag(cmd, &state, DefaultState, "the broker's state `directory`")
	return cmd
}
