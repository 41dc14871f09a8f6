package cli

import (
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"spectrum-os.org/broker/broker/api"
)

func (a *app) tokenCommand() *cobra.Command {
	var (
		file   string
		stdout bool
	)
	cmd := &cobra.Command{
		Use:   "token GRANT {--file FILE | --stdout}",
		Short: "Write a grant's token, which is a secret",
		Long: `Write a grant's token, base64url, to a new file that only its owner can read,
or to stdout. It is bound to its holder, and useless to any other VM; still it
is a secret, so it is never printed unasked.`,
		Example: `  spectrum-cap token 5f3a9c01 --file /run/user/1000/invoices.token
  spectrum-cap token 5f3a9c01 --stdout | install -m 600 /dev/stdin token`,
		Args:              args(1, 1, "a grant"),
		ValidArgsFunction: a.completeGrant,
		RunE: func(cmd *cobra.Command, got []string) error {
			if (file != "") == stdout {
				return usage("token needs --file or --stdout")
			}
			t, err := a.broker().Token(cmd.Context(), got[0])
			if err != nil {
				return err
			}
			if stdout {
				return a.print(t, func(w io.Writer) { _, _ = fmt.Fprintln(w, t.Token) })
			}
			if err := writeSecret(file, t); err != nil {
				return fmt.Errorf("cannot write the token: %w", err)
			}
			return a.print(map[string]string{"grant": t.Grant.String(), "file": file}, func(w io.Writer) {
				_, _ = fmt.Fprintf(w, "the token of grant %s is in %s\n", t.Grant, plain(file))
			})
		},
	}
	cmd.Flags().StringVar(&file, "file", "", "write it to this `file`, which must not exist, with mode 0600")
	cmd.Flags().BoolVar(&stdout, "stdout", false, "write it to stdout")
	return cmd
}

// writeSecret never writes into a file that someone else may have put there.
func writeSecret(name string, t api.Token) (err error) {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(t.Token + "\n")
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		_ = os.Remove(name)
	}
	return err
}
