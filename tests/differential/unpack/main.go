// SPDX-License-Identifier: Apache-2.0

// Unpack layers as containerd's overlay differ does (diff/apply/apply_linux.go of containerd). Silent and
// status 0 where it takes the layer; the error and status 1 where it refuses.
//
//	unpack [flags] TAR DIRECTORY           one layer into a directory that is there and empty
//	unpack [flags] -batch TARS DIRECTORIES each TARS/NAME.tar into DIRECTORIES/NAME, an error into NAME.error
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/archive"
	"github.com/sirupsen/logrus"
)

func apply(tar, directory string, options []archive.ApplyOpt) error {
	file, err := os.Open(tar)
	if err != nil {
		return err
	}
	defer file.Close()
	_, err = archive.Apply(context.Background(), directory, file, options...)
	return err
}

func batch(tars, directories string, options []archive.ApplyOpt) error {
	names, err := filepath.Glob(filepath.Join(tars, "*.tar"))
	for _, tar := range names {
		directory := filepath.Join(directories, strings.TrimSuffix(filepath.Base(tar), ".tar"))
		if err := os.Mkdir(directory, 0o755); err != nil {
			return err
		}
		if refused := apply(tar, directory, options); refused != nil {
			if err := os.WriteFile(directory+".error", []byte(refused.Error()), 0o644); err != nil {
				return err
			}
		}
	}
	return err
}

func main() {
	first := flag.Bool("first", false, "as the first layer of an image, which is mounted without an overlay")
	parent := flag.String("parent", "", "the directories of the layers below, topmost first, with colons between")
	many := flag.Bool("batch", false, "a directory of tars")
	flag.Parse()
	logrus.SetOutput(io.Discard)
	var options []archive.ApplyOpt
	if !*first {
		options = append(options, archive.WithConvertWhiteout(archive.OverlayConvertWhiteout))
	}
	if *parent != "" {
		options = append(options, archive.WithParents(strings.Split(*parent, ":")))
	}
	run := apply
	if *many {
		run = batch
	}
	if err := run(flag.Arg(0), flag.Arg(1), options); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
