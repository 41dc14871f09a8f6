package cli

import (
	"context"
	"fmt"
	"io"
	"os"
	"strconv"

	"github.com/spf13/cobra"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/keys"
	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/clock"
)

func (a *app) keysCommand() *cobra.Command {
	cmd := group(&cobra.Command{
		Use:   "keys",
		Short: "Look after the keys that sign tokens",
		Long: `Look after the keys that sign tokens. One key signs; those before it are
retired, and what they signed stays good until it expires or its grant ends. A
key that somebody else may have is revoked, with everything that it signed.`,
		Example: `  spectrum-cap keys list
  spectrum-cap keys rotate
  spectrum-cap keys revoke 3f9a2c1e --reason "the laptop was stolen"`,
	})
	cmd.AddCommand(a.keysListCommand(), a.keysRotateCommand(), a.keysRevokeCommand())
	return cmd
}

func (a *app) keysListCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List the keys, the oldest first",
		Long: `List the keys, the oldest first, with how many live grants each signs for. A
key of an earlier epoch (see 'ledger restore') signs for nothing any more.`,
		Example: `  spectrum-cap keys list
  spectrum-cap keys list -o json`,
		Args: args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			list, err := a.broker().ListKeys(cmd.Context())
			if err != nil {
				return err
			}
			return a.print(api.KeyList{Keys: list}, func(w io.Writer) {
				t := table{head: []string{"KEY", "STATE", "EPOCH", "CREATED", "ENDED", "GRANTS", "REASON"}, paint: a.stateColumn(1)}
				for _, k := range list {
					ended := ""
					switch {
					case k.Revoked != nil:
						ended = stamp(*k.Revoked)
					case k.Retired != nil:
						ended = stamp(*k.Retired)
					}
					t.add(k.KID, string(k.State), strconv.FormatUint(k.Epoch, 10), stamp(k.Created), ended, strconv.Itoa(k.Grants), k.Reason)
				}
				t.write(w)
			})
		},
	}
}

func (a *app) keysRotateCommand() *cobra.Command {
	var state string
	cmd := &cobra.Command{
		Use:   "rotate",
		Short: "Make a new key, and retire the one that signs",
		Long: `Make a new key, and retire the one that signs. No grant and no token ends by
that: the public half of the old key is kept, and its private half destroyed.

With --state it does so in the broker's state directory, while no broker runs,
whatever became of the present key's file: for when that is lost or damaged.`,
		Example: `  spectrum-cap keys rotate
  spectrum-cap keys rotate --state /var/lib/spectrum-broker`,
		Args: args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			var key api.Key
			var err error
			if state != "" {
				key.KID, err = a.offline(state).Rotate(cmd.Context())
			} else {
				key, err = a.broker().RotateKeys(cmd.Context())
			}
			if err != nil {
				return stopFirst(err)
			}
			var answer any = key
			if state != "" {
				answer = map[string]string{"kid": key.KID}
			}
			return a.print(answer, func(w io.Writer) {
				_, _ = fmt.Fprintf(w, "key %s signs from here on\n", key.KID)
			})
		},
	}
	stateFlag(cmd, &state, "", "make the key in this `directory`, without a broker")
	return cmd
}

func (a *app) keysRevokeCommand() *cobra.Command {
	var (
		req     api.RevokeKeyRequest
		waiting waitFlags
	)
	cmd := &cobra.Command{
		Use:   "revoke KEY",
		Short: "Revoke a key, with everything that it signed",
		Long: `Revoke a key, with everything that it signed: its tokens are refused at once,
and every grant ends for which it signed one or that was made while it was
current. The current key is replaced in the same step. It returns when access
is cut, as 'revoke' does, with the same exit codes.`,
		Example: `  spectrum-cap keys revoke 3f9a2c1e --reason "the laptop was stolen"
  spectrum-cap keys revoke 3f9a2c1e --no-wait`,
		Args: args(1, 1, "a key"),
		ValidArgsFunction: func(cmd *cobra.Command, got []string, _ string) ([]string, cobra.ShellCompDirective) {
			return a.complete(cmd, len(got) == 0, func(ctx context.Context) ([]string, error) {
				list, err := a.broker().ListKeys(ctx)
				var words []string
				for _, k := range list {
					if k.State != api.KeyRevoked {
						words = append(words, k.KID+"\t"+string(k.State))
					}
				}
				return words, err
			})
		},
		RunE: func(cmd *cobra.Command, got []string) error {
			wait, timeout, err := waiting.read(cmd)
			if err != nil {
				return err
			}
			req.Wait, req.TimeoutSeconds = wait, timeout.Seconds()
			ctx, cancel := within(cmd.Context(), timeout)
			defer cancel()
			end := a.progress("waiting until access is cut")
			res, err := a.broker().RevokeKey(ctx, got[0], req)
			end()
			if err != nil {
				return err
			}
			return a.keyRevoked(res)
		},
	}
	f := cmd.Flags()
	f.StringVar(&req.Reason, "reason", "", "`text` for the audit")
	waiting.register(f, "when access is cut")
	_ = cmd.RegisterFlagCompletionFunc("reason", cobra.NoFileCompletions)
	return cmd
}

func (a *app) keyRevoked(res api.RevokeKeyResult) error {
	all := append(append([]api.Grant{}, res.Revoked...), res.Revoking...)
	err := a.print(res, func(w io.Writer) {
		_, _ = fmt.Fprintf(w, "key %s is revoked; key %s signs\n", res.Key.KID, res.Current.KID)
		short := a.short(grantIDs(all))
		for _, g := range all {
			_, _ = fmt.Fprintln(w, plain(fmt.Sprintf("%s %s  %s  %s", g.State, short(g.ID), orElse(g.HolderName, g.Holder.String()), orElse(g.Spoken, g.Spelling))))
		}
	})
	if err != nil {
		return err
	}
	if n := len(res.Revoking); n > 0 {
		return &codedError{exitRevoking, fmt.Sprintf("revoking: access is not yet cut for %d of %d grants", n, len(all))}
	}
	return nil
}

// offline works on a state directory that no broker uses.
func (a *app) offline(state string) keys.Offline {
	uid := uint32(os.Getuid()) //nolint:gosec // a uid
	return keys.Offline{
		Dir: state, Clock: clock.System{},
		Actor: ledger.Actor{Kind: ledger.ActorPerson, UID: &uid, PID: os.Getpid()},
	}
}

func stateFlag(cmd *cobra.Command, into *string, value, text string) {
	cmd.Flags().StringVar(into, "state", value, text)
	_ = cmd.MarkFlagDirname("state")
}
